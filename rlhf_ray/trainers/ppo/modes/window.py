"""Which prompts may be begun, and which answers a step gets, in the mode ``windowed``: a pure state machine.

Invariants:

- Prompts are numbered in the order in which they are taken; step ``s`` learns from those of the numbers ``s * size`` up to
  ``(s + 1) * size``, all of them and no others.
- A prompt of step ``s`` is begun only once step ``s - steps`` has been taken. Each step publishes once at most, after it was
  taken, so no answer is older than ``steps`` publications when its step learns.
- Where a step waits for its answers, some of them are under way or may be begun: no sizes make it wait for ever.
- A slice lies in one step, and is finished as a whole or not at all.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Answers = TypeVar("Answers")


@dataclass(frozen=True)
class Slice:
    """Prompts that are begun together."""

    step: int
    first: int
    """The number of its first prompt."""
    prompts: int


@dataclass
class Window(Generic[Answers]):
    """``steps`` is how far ahead of the step that learns others may be begun; each has ``size`` prompts.

    ``step`` is the next to be taken, and the first that counts; the run ends before step ``total``.
    """

    steps: int
    size: int
    total: int
    step: int
    _begun: int = field(init=False)
    _finished: dict[int, tuple[Slice, Answers]] = field(init=False, default_factory=dict)
    """By the number of the first prompt."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.size < 1:
            raise ValueError(f"a window of {self.steps} steps of {self.size} prompts: both must be 1 or more")
        self._begun = self.step * self.size

    def next(self, most: int) -> Slice | None:
        """Begin up to ``most`` prompts; none where the window is full: a step must be taken first."""
        limit = min(self.step + self.steps, self.total) * self.size
        count = min(most, limit - self._begun, self.size - self._begun % self.size)
        if count <= 0:
            return None
        begun = Slice(self._begun // self.size, self._begun, count)
        self._begun += count
        return begun

    def finish(self, begun: Slice, answers: Answers) -> None:
        """The answers to a slice are there."""
        self._finished[begun.first] = (begun, answers)

    def ready(self) -> bool:
        """Whether all answers of the next step are there."""
        return sum(one.prompts for one, _ in self._of(self.step)) == self.size

    def take(self) -> list[tuple[Slice, Answers]]:
        """The answers of the next step, in the order of its prompts; the window moves on by one step."""
        if not self.ready():
            raise ValueError(f"step {self.step} has not all its answers")
        taken = list(self._of(self.step))
        for one, _ in taken:
            del self._finished[one.first]
        self.step += 1
        return taken

    def kept(self) -> list[tuple[Slice, Answers]]:
        """Finished slices from the next step on, without a gap before them: what may be used after a resume."""
        kept, number = list[tuple[Slice, Answers]](), self.step * self.size
        while number in self._finished:
            kept.append(self._finished[number])
            number += self._finished[number][0].prompts
        return kept

    def restore(self, slices: Iterable[tuple[Slice, Answers]]) -> None:
        """Take what :meth:`kept` gave, before anything is begun."""
        for one, answers in slices:
            if one.first != self._begun or one.step != one.first // self.size:
                raise ValueError(f"prompt {one.first} of step {one.step} does not follow prompt {self._begun - 1}")
            self._begun += one.prompts
            self.finish(one, answers)

    def counts(self) -> tuple[int, int]:
        """Prompts that are under way, and prompts whose answers wait for their step."""
        waiting = sum(one.prompts for one, _ in self._finished.values())
        return self._begun - self.step * self.size - waiting, waiting

    def _of(self, step: int) -> Sequence[tuple[Slice, Answers]]:
        return [self._finished[first] for first in sorted(self._finished) if self._finished[first][0].step == step]
