"""Another scorer in a process of its own, which scores the same token ids once a turn.

Invariants: it has as many threads as this project's scorer and its libraries' own settings, not this project's. Every turn
is answered with its seconds and its scores.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.peers.line_process import LineProcess
from rlhf_ray.environment import KERNEL_CACHES

Score = Callable[[], list[float]]


class ScoringPeer(LineProcess):
    """The process of the module ``program``, which calls :func:`take_turns`; ``order`` is passed to its ``load``."""

    def __init__(
        self, program: str, directory: Path, sequences: Sequence[Sequence[int]], *, threads: int, **order: Any
    ) -> None:
        settings = {name: value for name, value in os.environ.items() if name not in KERNEL_CACHES}
        settings |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
        super().__init__([sys.executable, "-m", program], settings)
        self.send(directory=str(directory), sequences=[list(sequence) for sequence in sequences], **order)
        self.score()

    def score(self) -> tuple[float, list[float]]:
        """Score everything once; returns the seconds it took and the scores."""
        self.send()
        answer = self.receive()
        return float(answer["seconds"]), list(answer["scores"])


def take_turns(load: Callable[[dict[str, Any]], Score]) -> None:
    """The main loop of the process: load once, then score once for every line on standard input."""
    _answer(imported=True)
    score = load(json.loads(sys.stdin.readline()))
    for _ in sys.stdin:
        started_at = time.monotonic()
        scores = score()
        _answer(seconds=time.monotonic() - started_at, scores=scores)


def _answer(**answer: Any) -> None:
    print(json.dumps(answer), flush=True)
