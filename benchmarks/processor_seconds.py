"""Processor seconds that each process of a PPO run takes in a step.

Invariant: a step is what lies between two lines of the run's metrics, so that starting and ending belong to no step.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil

POLL_S = 0.02
PREFIX = "ray::"
"""How Ray names the process of an actor, before the actor's class and the method that it runs."""
DRIVER = "driver"
"""All processes of a run that are no actors: the driver, its parent, and Ray's own."""

Seconds = Mapping[str, float]
"""Processor seconds since a process began, summed by role."""


def by_role(root: int) -> Seconds:
    """Processor seconds of a process and all below it, now, by the class of their actor without its ending."""
    seconds: dict[str, float] = defaultdict(float)
    parent = psutil.Process(root)
    for process in (parent, *parent.children(recursive=True)):
        try:
            title, times = " ".join(process.cmdline()), process.cpu_times()
        except psutil.Error:  # it has ended meanwhile
            continue
        seconds[role_of(title)] += times.user + times.system
    return seconds


def role_of(title: str) -> str:
    """The role of the process with this title: ``ray::CriticModelActor.values`` is the critic."""
    if not title.startswith(PREFIX) or "Actor" not in title:
        return DRIVER
    return title.removeprefix(PREFIX).partition("Actor")[0].removesuffix("Model").lower()


def watch(ended: Callable[[], bool], root: int, metrics: Path) -> list[Seconds]:
    """The processor seconds by role at the end of each step, until ``ended``; ``metrics`` is the file of the run's metrics."""
    ends: list[Seconds] = []
    while not ended():
        try:
            done = metrics.read_text("utf-8").count('"time/step"') if metrics.is_file() else 0
            if done > len(ends):
                ends.append(by_role(root))
        except psutil.Error:
            break
        time.sleep(POLL_S)
    return ends


def per_step(ends: list[Seconds]) -> dict[str, float]:
    """Mean seconds of a step by role, over all steps but the first."""
    if len(ends) < 2:
        return {}
    first, last = ends[0], ends[-1]
    return {role: (last[role] - first.get(role, 0.0)) / (len(ends) - 1) for role in sorted(last)}
