"""``python -m rlhf_ray.monitoring.dashboards DIRECTORY``: write the dashboards there, a file each."""

from __future__ import annotations

import sys
from pathlib import Path

from rlhf_ray.monitoring.dashboards.boards import BOARDS, render
from rlhf_ray.storage.output import OutputFile

if __name__ == "__main__":
    for _board in BOARDS:
        OutputFile(Path(sys.argv[1]) / f"{_board.name}.json", "the dashboard", overwrite=True).write(render(_board))
