"""Two runs of one job that take turns at their steps, so that a slow moment of the machine slows both.

Invariants: of two runs that have begun, one works at a time; the other waits in its reward function until the first has come to
the same place of its own step. The place is the last call for rewards of a step, when all answers have been sampled. A step is
what lies between two such places, so that what comes before the first and after the last is in none. A run that has had all its
turns hands over and waits no more, so that the last step of the other one may share the machine with its end.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import psutil

from benchmarks.processor_seconds import by_role

PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from benchmarks.turns import Turns
TURNS = Turns({directory!r}, {own!r}, {other!r}, {first}, {answers}, {turns})
def length(responses):
    TURNS.answered(len(responses))
    return [len(response) % 7 / 7 for response in responses]
"""
"""The reward function of a run."""
POLL_S, LIMIT_S = 0.005, 300.0
ROOT = Path(__file__).parents[1]


def program(directory: Path, own: str, other: str, *, first: int, answers: int, turns: int) -> str:
    """The reward function of the run called ``own``, with ``answers`` a step, ``first`` before, and so many ``turns``."""
    places = {"root": str(ROOT), "directory": str(directory), "own": own, "other": other}
    return PROGRAM.format(first=first, answers=answers, turns=turns, **places)


@dataclass(frozen=True)
class Step:
    """What lies between two of a run's turns."""

    seconds: float
    """From the moment it went on to the moment at which it handed over."""
    processor_s: float
    """Of all processes of the run, those in which it waited for this step included."""


class Turns:
    """The side of one run, in the process of its reward function."""

    def __init__(self, directory: str, own: str, other: str, first: int, answers: int, turns: int) -> None:
        self._path, self._turn = Path(directory) / own, Path(directory) / "turn"
        self._own, self._other = own, other
        self._left, self._answers, self._turns = first + answers, answers, turns
        self._root = _run_of(psutil.Process())

    def answered(self, answers: int) -> None:
        """Note that so many answers came; after the last of a step, wait for the other run."""
        self._left -= answers
        if self._left > 0 or self._turns < 0:
            return
        if self._left < 0:
            raise AssertionError(f"{-self._left} answers of the next step came with those of this one: it has no end")
        self._left, self._turns = self._answers, self._turns - 1
        ended = time.monotonic()
        self._give()
        limit = ended + LIMIT_S
        while self._turns >= 0 and self._turn.read_text() != self._own:
            if time.monotonic() > limit:
                raise TimeoutError(f"the run {self._other} has not come to its next step within {LIMIT_S:g} s")
            time.sleep(POLL_S)
        processor_s = sum(by_role(self._root).values())
        with self._path.open("a") as lines:
            lines.write(f"{ended!r} {processor_s!r} {time.monotonic()!r}\n")

    def _give(self) -> None:
        new = self._turn.with_name(f"turn.{self._own}")
        new.write_text(self._other)
        os.replace(new, self._turn)


def steps(directory: Path, own: str) -> list[Step]:
    """The steps of a run, in their order."""
    turns = [[float(word) for word in line.split()] for line in (directory / own).read_text().splitlines()]
    return [
        Step(ended - began, processor_s - before) for (_, before, began), (ended, processor_s, _) in pairwise(turns)
    ]


def _run_of(process: psutil.Process) -> int:
    """The process id of the command that this process belongs to."""
    return next(parent.pid for parent in process.parents() if parent.cmdline()[1:3] == ["-m", "rlhf_ray"])
