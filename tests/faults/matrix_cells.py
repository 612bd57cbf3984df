"""The cells of the matrix of faults: which role meets which fault in which phase, and which of them cannot exist.

Always true: every combination of role, phase and fault is a cell or has a reason why it is none; a cell is known by the
digest of the files that its role and its phase run, so that a verdict counts only as long as none of them has changed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Literal

Role = Literal["driver", "policy", "critic", "reference", "reward", "rollout"]
Phase = Literal["start", "rollout", "scoring", "log_probs", "update", "weights", "checkpoint", "evaluation"]
Fault = Literal["SIGKILL", "SIGSTOP", "exception", "hang", "slowness"]
Where = Literal["Ray", "one process"]
ROLES: tuple[Role, ...] = ("driver", "policy", "critic", "reference", "reward", "rollout")
PHASES: tuple[Phase, ...] = (
    "start", "rollout", "scoring", "log_probs", "update", "weights", "checkpoint", "evaluation",
)  # fmt: skip
FAULTS: tuple[Fault, ...] = ("SIGKILL", "SIGSTOP", "exception", "hang", "slowness")
SIGNALS: tuple[Fault, ...] = ("SIGKILL", "SIGSTOP")
"""What can meet a process whether it has work or not."""

CALLS: dict[Phase, dict[Role, str]] = {
    "start": {"policy": "setup", "critic": "setup", "reference": "setup", "reward": "setup", "rollout": "setup"},
    "rollout": {"rollout": "generate"},
    "scoring": {"reward": "score"},
    "log_probs": {"policy": "log_probs", "critic": "values", "reference": "log_probs"},
    "update": {"policy": "accumulate", "critic": "accumulate"},
    "weights": {"policy": "publish_weights", "rollout": "receive"},
    "checkpoint": {"policy": "begin_save", "critic": "begin_save"},
    "evaluation": {"reward": "score", "rollout": "generate"},
}
"""What the ranks of a role are asked for in a phase; a role that is not there has no work in it."""

PACKAGE = Path(__file__).parents[2] / "rlhf_ray"
EVERYWHERE = (
    "actors/groups.py", "actors/ranks.py", "actors/cluster.py", "actors/place.py", "actors/shells.py", "actors/workers/base.py",
    "launch/driver.py", "launch/parent.py", "processes", "runs", "storage", "errors.py", "pending.py", "monitoring/phases.py",
    "trainers/ppo/loop.py", "trainers/session.py", "trainers/watchdog.py", "trainers/recovery", "monitoring/stalls.py",
)  # fmt: skip
"""Files and rooms that every cell runs, below the package."""
OF_ROLE: dict[Role, tuple[str, ...]] = {
    "driver": (),
    "policy": ("actors/workers/model.py", "actors/workers/policy.py", "engine"),
    "critic": ("actors/workers/model.py", "actors/workers/critic.py", "engine"),
    "reference": ("actors/workers/model.py", "actors/workers/policy.py"),
    "reward": ("actors/workers/model.py", "actors/workers/reward.py", "rewards"),
    "rollout": ("actors/workers/rollout.py", "actors/engines.py", "rollout/fleet", "rollout/health.py"),
}
OF_PHASE: dict[Phase, tuple[str, ...]] = {
    "start": ("trainers/ppo/build.py", "actors/loading.py", "actors/reservation.py", "actors/connection.py"),
    "rollout": ("trainers/ppo/modes", "trainers/ppo/sampling.py", "rollout/fleet"),
    "scoring": ("trainers/ppo/experience.py", "rewards"),
    "log_probs": ("trainers/ppo/experience.py",),
    "update": ("trainers/ppo/update.py", "engine"),
    "weights": ("actors/publisher.py", "rollout/weights", "rollout/wire.py", "rollout/fleet"),
    "checkpoint": ("trainers/checkpointing.py", "engine/shards.py", "engine/saving"),
    "evaluation": ("trainers/ppo/evaluation.py", "trainers/ppo/experience.py"),
}


@dataclass(frozen=True)
class Cell:
    """One fault that meets one role in one phase."""

    role: Role
    phase: Phase
    fault: Fault

    def __str__(self) -> str:
        return f"{self.role}/{self.phase}/{self.fault}"


def why_not(cell: Cell) -> str | None:
    """Why a cell cannot exist; None where it can."""
    if cell.role == "driver" or cell.fault in SIGNALS or cell.role in CALLS[cell.phase]:
        return None
    return f"the {cell.role} has no work in this phase that could fail, hang or be slow"


def cells() -> list[Cell]:
    """Every cell that can exist, in the order of the table."""
    return [cell for one in product(ROLES, PHASES, FAULTS) if why_not(cell := Cell(*one)) is None]


def where(cell: Cell) -> Where:
    """Where a cell is run: an error or a slow call needs no process of its own, unless the driver's parent has to help."""
    return "one process" if cell.role != "driver" and cell.fault in ("exception", "slowness") else "Ray"


def digest(cell: Cell) -> str:
    """Of all files that the cell runs, by their names and contents."""
    return _digest((*EVERYWHERE, *OF_ROLE[cell.role], *OF_PHASE[cell.phase]))


@cache
def _digest(places: Sequence[str]) -> str:
    total = hashlib.sha256()
    for path in sorted({path for place in places for path in _files(PACKAGE / place)}):
        total.update(str(path.relative_to(PACKAGE)).encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()[:16]


def _files(place: Path) -> Iterator[Path]:
    if place.is_file():
        yield place
    yield from place.rglob("*.py")
