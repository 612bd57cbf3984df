"""A peer of the offline scorer in a process of its own, which scores the same ids whenever it is told to.

Always true: it runs with its libraries' own settings where this project has others, and with as many threads as ours; a
turn ends in one line with its seconds and its scores.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.line_process import Asked
from rlhf_ray.environment import KERNEL_CACHES

Score = Callable[[], list[float]]


class ScoringPeer(Asked):
    """The process of ``program``, a module that calls :func:`take_turns`; ``order`` is for its ``load``."""

    def __init__(
        self, program: str, directory: Path, sequences: Sequence[Sequence[int]], *, threads: int, **order: Any
    ) -> None:
        settings = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES}
        settings |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        super().__init__([sys.executable, "-m", program], settings)
        self.ask(directory=str(directory), sequences=[list(sequence) for sequence in sequences], **order)
        self.score()

    def score(self) -> tuple[float, list[float]]:
        """One turn: seconds and scores."""
        self.ask()
        told = self.answer()
        return float(told["seconds"]), list(told["scores"])


def take_turns(load: Callable[[dict[str, Any]], Score]) -> None:
    """In the process: load once; then a turn for every line."""
    _answer(imported=True)
    score = load(json.loads(sys.stdin.readline()))
    for _ in sys.stdin:
        began = time.monotonic()
        scores = score()
        _answer(seconds=time.monotonic() - began, scores=scores)


def _answer(**told: Any) -> None:
    print(json.dumps(told), flush=True)
