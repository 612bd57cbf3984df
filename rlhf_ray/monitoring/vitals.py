"""How long the step, the phase, the last commit and a call to the reward source of a run have lasted, and how long they may.

Invariants: a limit is given only once what it is a limit of is known to take a time, in this attempt or before; nothing of it
before the first step of an attempt has ended. What is not known is left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from rlhf_ray.monitoring.stalls import KEPT, Limits, OpenPhase

LONG_PHASES = ("evaluation", "checkpoint", "recovery", "report")
"""What does not belong to every step, so that a step in which it comes takes as much longer."""
SCORING = "scoring"
"""The phase that waits for calls to the reward source, which have a limit of their own."""
STEP_FLOORS = 2.0
"""Floors that a step has at least, so that what it waits for is overdue first."""
COMMIT_INTERVALS = 2.0
SHORTEST_COMMIT_LIMIT_S = 600.0
COMMIT_ROOM, LEAST_ROOM_GB = 2.0, 0.1


@dataclass(frozen=True)
class Progress:
    """What the driver knows of itself; times are in seconds of one monotonic clock."""

    now: float
    last_step_at: float | None
    """When the last step of this attempt ended; None before."""
    steps_s: Sequence[float]
    """How long the last steps took."""
    phases: Sequence[OpenPhase]
    committed_at: float
    """When the newest commit was first seen, or the attempt began."""
    commit_every: int | None
    """``checkpoint.every_steps``."""
    reward_call_s: float = 0.0
    usual_reward_call_s: float | None = None


def vitals(progress: Progress, limits: Limits, longest_commit_s: float) -> dict[str, float]:
    """Metrics of the group *State of the run*; ``longest_commit_s`` is the interval of commits where no steps are named."""
    values = {"age/reward_call": progress.reward_call_s}
    usual = median(progress.steps_s[-KEPT:]) if progress.steps_s else None
    if progress.last_step_at is None or usual is None:
        return values
    unusual = [phase for phase in progress.phases if phase.usual_s is None or phase.name in LONG_PHASES]
    longer = sum(limits.of(phase.usual_s) for phase in unusual)
    if progress.usual_reward_call_s is not None and not unusual:  # an evaluation may have more scored in a call
        values["limit/reward_call"] = limits.of(progress.usual_reward_call_s)
    commit = _commit_limit(progress.commit_every, usual, longest_commit_s)
    if commit is not None:
        values |= {"age/commit": progress.now - progress.committed_at, "limit/commit": commit + longer}
    limit = max(limits.of(usual), STEP_FLOORS * limits.floor_s) + longer
    step = {"age/step": progress.now - progress.last_step_at, "limit/step": limit}
    return {**values, **step, **_phase(progress, limits)}


def _phase(progress: Progress, limits: Limits) -> Mapping[str, float]:
    known = [
        (progress.now - phase.entered_at, limits.of(phase.usual_s))
        for phase in progress.phases
        if phase.usual_s is not None and not (phase.name == SCORING and progress.usual_reward_call_s is not None)
    ]
    if not known:
        return {}
    age, limit = max(known, key=lambda one: one[0] / one[1])
    return {"age/phase": age, "limit/phase": limit}


def _commit_limit(every: int | None, usual_s: float, longest_s: float) -> float | None:
    if every is None:
        return COMMIT_INTERVALS * max(longest_s, usual_s)
    if every == 0:
        return None
    return max(COMMIT_INTERVALS * every * usual_s, SHORTEST_COMMIT_LIMIT_S)


def room_needed_gb(commit_bytes: int) -> float:
    """What must be free for the next commit, which is written before an old one goes."""
    return max(COMMIT_ROOM * commit_bytes / 1e9, LEAST_ROOM_GB)
