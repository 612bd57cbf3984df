"""Who lies on GPUs that all roles share, and in which order they come and go: a pure state machine.

Invariants:

- At every moment, also in the middle of a change and after one that failed, what is on the device is at most what one phase of
  a step may have there (:data:`WANTED`), and the memory of each phase is planned (``colocation/memory.py``).
- A change makes room before it takes any, and a phase begins only when all that it needs is on the device.
- A move that failed counts as made where it takes memory, and as not made where something needs it; the next change makes it
  again. So no failure leaves a state from which a phase cannot be reached.
- What loads a model comes in a phase in which it may have all; a process that has died holds nothing.

The same levels hold for everybody. A rollout engine has its weights and its KV cache (``ALL``), its weights alone, or sleeps. A
role that trains has its weights and the states of its optimizer, the weights alone, or all of it on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum, StrEnum


class Level(IntEnum):
    """How much of what it holds is on the device."""

    AWAY = 0
    WEIGHTS = 1
    ALL = 2


class Phase(StrEnum):
    """What a step does with the GPUs."""

    GENERATE = "generate"
    SCORE = "score"
    """Log-probs, values and rewards of a batch."""
    LEARN = "learn"
    """Updates, and checkpoints."""
    PUBLISH = "publish"
    """Weights go from the policy to the engines."""


class Kind(StrEnum):
    """What somebody on the device is, as far as its moves differ."""

    ENGINE = "engine"
    POLICY = "policy"
    CRITIC = "critic"
    FROZEN = "frozen"
    """A model that only scores, and has weights alone."""


TRAINED = (Kind.POLICY, Kind.CRITIC)
WANTED: Mapping[Phase, Mapping[Kind, Level]] = {
    Phase.GENERATE: {Kind.ENGINE: Level.ALL, Kind.POLICY: Level.AWAY, Kind.CRITIC: Level.AWAY, Kind.FROZEN: Level.AWAY},
    Phase.SCORE: {Kind.ENGINE: Level.AWAY, Kind.POLICY: Level.ALL, Kind.CRITIC: Level.ALL, Kind.FROZEN: Level.ALL},
    Phase.LEARN: {Kind.ENGINE: Level.AWAY, Kind.POLICY: Level.ALL, Kind.CRITIC: Level.ALL, Kind.FROZEN: Level.AWAY},
    Phase.PUBLISH: {
        Kind.ENGINE: Level.WEIGHTS,
        Kind.POLICY: Level.WEIGHTS,
        Kind.CRITIC: Level.AWAY,
        Kind.FROZEN: Level.AWAY,
    },
}
"""How much of each kind is on the device in a phase."""


@dataclass(frozen=True)
class Move:
    """Somebody goes to a level."""

    who: str
    goal: Level


Stage = tuple[Move, ...]
"""Moves that may be made side by side."""


@dataclass
class _Held:
    kind: Kind
    most: Level
    """What it may have on the device: this much memory counts as taken."""
    least: Level
    """What it surely has there."""


class Residents:
    """Everybody that has a model on the shared GPUs, each under a name."""

    def __init__(self) -> None:
        self._held: dict[str, _Held] = {}

    def most(self, who: str) -> Level:
        """How much ``who`` may have on the device at this moment."""
        return self._held[who].most if who in self._held else Level.AWAY

    def serves(self, phase: Phase) -> bool:
        """Whether all is on the device that ``phase`` needs, and nothing else."""
        return all(one.most == one.least == WANTED[phase][one.kind] for one in self._held.values())

    def came(self, who: str, kind: Kind) -> None:
        """``who`` begins to load its model; raises ``ValueError`` where the others have not made room for it."""
        self._held[who] = _Held(kind, Level.ALL, Level.ALL)
        if not within_a_phase({name: (one.kind, one.most) for name, one in self._held.items()}):
            del self._held[who]
            raise ValueError(f"{who} loads its model while others are on its GPU")

    def gone(self, who: str) -> None:
        """The process of ``who`` has ended."""
        self._held.pop(who, None)

    def begin(self, move: Move) -> None:
        """``move`` begins: until it is :meth:`done`, it counts as made and as not made, whichever is worse."""
        one = self._held[move.who]
        one.most, one.least = max(one.most, move.goal), min(one.least, move.goal)

    def done(self, move: Move) -> None:
        """``move`` was made."""
        one = self._held[move.who]
        one.most = one.least = move.goal

    def changes(self, phase: Phase) -> list[Stage]:
        """The moves after which ``phase`` has what it needs, stage by stage; none where it has."""
        paths = {who: _path(one, WANTED[phase][one.kind]) for who, one in self._held.items()}
        first, last = [], []
        through_all = [who for who, path in paths.items() if len(path) > 1 and self._held[who].kind in TRAINED]
        for who, path in paths.items():
            one = self._held[who]
            # A role that trains comes with all that it has, for which engines make room.
            if through_all and one.kind is Kind.ENGINE and one.most > Level.AWAY:
                first.append(Move(who, Level.AWAY))
                if WANTED[phase][one.kind] > Level.AWAY:
                    last.append(Move(who, WANTED[phase][one.kind]))
            elif who in through_all:
                continue
            elif len(path) > 1:
                first.append(Move(who, path[0]))
                last.append(Move(who, path[1]))
            elif path:
                (first if path[0] <= one.least else last).append(Move(who, path[0]))
        detours = [(Move(who, goal),) for who in through_all for goal in paths[who]]
        return [stage for stage in (tuple(first), *detours, tuple(last)) if stage]


def _path(one: _Held, goal: Level) -> list[Level]:
    """The levels through which it goes from where it is to ``goal``."""
    if one.most == one.least == goal:
        return []
    if one.kind is Kind.ENGINE:
        # vLLM gives up weights and cache together, and takes them back one by one.
        return [Level.AWAY, goal] if Level.AWAY < goal < one.most else [goal]
    # DeepSpeed gives up states one by one, and takes them back together.
    return [Level.ALL, goal] if one.least < goal < Level.ALL else [goal]


def within_a_phase(held: Mapping[str, tuple[Kind, Level]]) -> bool:
    """Whether what is held is at most what one phase may have on the device."""
    return any(_within(held.values(), wanted) for wanted in WANTED.values())


def _within(held: Iterable[tuple[Kind, Level]], wanted: Mapping[Kind, Level]) -> bool:
    return all(level <= wanted[kind] for kind, level in held)
