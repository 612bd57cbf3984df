"""What follows from the loss of groups: which of them start again, and to which step the run goes back. Pure.

While a run starts, nothing is learned yet, and what was lost loads again; there it is only asked whether that has a point.

Invariants: after a plan is carried out all trained groups hold the weights of one and the same step, to which the driver goes
back too. Nothing is lost where no trained group is and none has begun to learn; else no more than came after the last commit.
A group that lives and whose state is right, or can be read from the commit, keeps its processes. At the start no error but the
death of a process is met twice, and no role is started again more often than the config allows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import dataclass

from rlhf_ray.errors import DeadRankError, GroupError

NUMBERS = re.compile(r"0x[0-9a-f]+|\d+")


@dataclass(frozen=True)
class Plan:
    """What to do, in this order: start again, load, go back."""

    restart: frozenset[str]
    """Groups whose processes are ended and started again, with the models that they started from."""
    load: frozenset[str]
    """Trained groups that then load the last commit."""
    back_to: int
    """The step from which the run goes on; 0 is its beginning."""


def decide(lost: Set[str], trained: Set[str], *, step: int, touched: bool, committed: int | None) -> Plan:
    """The plan for the groups ``lost``, where ``step`` steps are finished and ``committed`` is the newest commit.

    ``trained`` are the groups that learn. They hold the weights of ``step``, unless they are ``touched``: since then they have
    begun to learn, or to load.
    """
    if not touched and not lost & trained:
        return Plan(frozenset(lost), frozenset(), step)
    if committed is None:
        # Nothing but its files has the beginning, but where nothing was learned a group that lives is still there.
        moved = trained if touched or step > 0 else frozenset[str]()
        return Plan(frozenset(lost | moved), frozenset(), 0)
    return Plan(frozenset(lost), frozenset(trained), committed)


def loads_again(error: GroupError, before: Sequence[GroupError], *, most: int) -> bool:
    """Whether what failed with ``error`` while a run starts is started again; ``before`` are those for which it was.

    Processes die for reasons that pass, and are started again ``most`` times. What they say themselves, and a deadline that
    they miss, come from what they load: once more, and if it is the same then, only another config or model helps.
    """
    if len(before) >= most:
        return False
    return isinstance(error, DeadRankError) or all(kind(error) != kind(one) for one in before)


def kind(error: GroupError) -> tuple[type[GroupError], str, str]:
    """What errors have in common that are the same: all but numbers, such as addresses, ports and what memory was free."""
    return type(error), error.phase, NUMBERS.sub("#", error.cause.partition("\n")[0])
