"""``rlhf-ray`` with a ``breakpoint()`` in the workers, as someone who debugs a rank would write one; and a debugger that only
notes that it was reached.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rlhf_ray.cli.main import main


def note() -> None:
    """In the place of a debugger (``PYTHONBREAKPOINT``): append what the frame that stopped can see to a file."""
    worker = sys._getframe(1).f_locals["worker"]
    health = worker.health()
    with Path(os.environ["BREAKPOINTS"]).open("a") as notes:
        notes.write(json.dumps({"role": health["role"], "pid": health["pid"], "here": os.getpid()}) + "\n")


def stop_in_workers() -> None:
    """Put a breakpoint at the start of every worker's ``setup``."""
    from rlhf_ray.actors.model_worker import ModelWorker
    from rlhf_ray.actors.rollout_worker import RolloutWorker

    for worker_class in (ModelWorker, RolloutWorker):
        _stop_before(worker_class)


def _stop_before(worker_class: Any) -> None:
    setup = worker_class.setup

    def stopping_setup(worker: Any, *arguments: Any) -> Any:
        breakpoint()
        return setup(worker, *arguments)

    worker_class.setup = stopping_setup


if __name__ == "__main__":
    stop_in_workers()
    print(os.getpid())
    sys.exit(main())
