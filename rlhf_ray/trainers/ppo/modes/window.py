"""Which prompts may be begun, and which answers a step gets, in the mode ``windowed``: a pure state machine.

Invariants:

- Prompts are numbered in the order in which they are taken; step ``s`` learns from those of the numbers ``s * size`` up to
  ``(s + 1) * size``, all of them and no others, whichever is answered first.
- A prompt of step ``s`` is begun only once step ``s - steps`` has been taken, one for each that a step takes away. Each step
  publishes once at most, after it was taken, so no token is older than ``steps`` publications when its step learns.
- Where a step waits for its answers, they are under way or may be begun: no sizes make it wait for ever.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

Answers = TypeVar("Answers")


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
    _answered: dict[int, Answers] = field(init=False, default_factory=dict)
    """By the number of the prompt."""

    def __post_init__(self) -> None:
        if self.steps < 1 or self.size < 1:
            raise ValueError(f"a window of {self.steps} steps of {self.size} prompts: both must be 1 or more")
        self._begun = self.step * self.size

    def next(self) -> int | None:
        """Begin a prompt, by its number; none where the window is full: a step must be taken first."""
        if self._begun >= min(self.step + self.steps, self.total) * self.size:
            return None
        self._begun += 1
        return self._begun - 1

    def step_of(self, number: int) -> int:
        """The step that learns from a prompt."""
        return number // self.size

    def finish(self, number: int, answers: Answers) -> None:
        """The answers to a prompt are there."""
        if not self.step * self.size <= number < self._begun or number in self._answered:
            raise ValueError(f"prompt {number} was not begun, or is answered already")
        self._answered[number] = answers

    def ready(self) -> bool:
        """Whether all answers of the next step are there."""
        return all(number in self._answered for number in self._numbers())

    def take(self) -> list[Answers]:
        """The answers of the next step, in the order of its prompts; the window moves on by one step."""
        if not self.ready():
            raise ValueError(f"step {self.step} has not all its answers")
        taken = [self._answered.pop(number) for number in self._numbers()]
        self.step += 1
        return taken

    def answered(self) -> dict[int, Answers]:
        """Answers that no step has taken, by the numbers of their prompts, in their order."""
        return dict(sorted(self._answered.items()))

    def counts(self) -> tuple[int, int]:
        """Prompts that are under way, and prompts whose answers wait for their step."""
        return self._begun - self.step * self.size - len(self._answered), len(self._answered)

    def _numbers(self) -> range:
        return range(self.step * self.size, (self.step + 1) * self.size)
