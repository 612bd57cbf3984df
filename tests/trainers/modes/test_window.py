"""The window of the mode ``windowed``, over every order of events.

What must hold, whatever the engines and the trainer do when: no token is older than the window when its step learns; each step
gets its own prompts, each once; a trainer that waits is never waited for in turn; a resume keeps what was answered.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.trainers.ppo.modes.window import Window


class Run:
    """A trainer, engines and a checkpoint, driven one event at a time; every claim is asserted as it goes.

    The answers to a prompt are its number and the version that sampled its first token.
    """

    def __init__(self, steps: int, size: int, total: int) -> None:
        self.steps, self.size, self.total = steps, size, total
        self.window: Window[tuple[int, int]] = Window(steps, size, total, 0)
        self.work: dict[int, int] = {}
        """Prompts in work, and the version when each was begun."""
        self.version = 0
        self.learning = False
        self.used: list[int] = []
        self.ages: list[int] = []
        self.checkpoint: tuple[int, int, dict[int, tuple[int, int]]] = (0, 0, {})

    def begin(self, most: int) -> None:
        for _ in range(most):
            if (number := self.window.next()) is not None:
                self.work[number] = self.version

    def finish(self, which: int) -> None:
        """Any of the prompts in work, not only the first."""
        if self.work:
            number = sorted(self.work)[which % len(self.work)]
            self.window.finish(number, (number, self.work.pop(number)))

    def take(self) -> None:
        if not self.learning and self.window.ready():
            taken, self.learning = self.window.take(), True
            self.used += [number for number, _ in taken]
            self.ages += [self.version - version for _, version in taken]

    def learn(self, applied: bool) -> None:
        """A step has learned; it is published while prompts are in work, and committed."""
        if self.learning:
            self.learning = False
            self.version += applied
            self.checkpoint = (self.window.step, self.version, self.window.answered())

    def restart(self) -> None:
        """The engines died: what they had in work is begun again, by the newest weights."""
        self.work = dict.fromkeys(self.work, self.version)

    def resume(self) -> None:
        """The process was killed: only the checkpoint is left, and all prompts up to its last answer are begun again."""
        step, self.version, kept = self.checkpoint
        self.used, self.work, self.learning = self.used[: step * self.size], {}, False
        self.window = Window(self.steps, self.size, self.total, step)
        for _ in range(step * self.size, max(kept, default=-1) + 1):
            number = self.window.next()
            assert number is not None
            if number in kept:
                self.window.finish(number, kept[number])
            else:
                self.work[number] = self.version

    def check(self) -> None:
        assert self.used == list(range(len(self.used))), "every prompt once, in order"
        assert max(self.ages, default=0) <= self.steps


events = st.one_of(
    st.tuples(st.just("begin"), st.integers(1, 7)),
    st.tuples(st.just("finish"), st.integers(0, 9)),
    st.tuples(st.just("take")),
    st.tuples(st.just("learn"), st.booleans()),
    st.tuples(st.just("restart")),
    st.tuples(st.just("resume")),
)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.lists(events, max_size=80))
def test_no_token_is_older_than_the_window_and_every_prompt_is_used_once(
    steps: int, size: int, total: int, order: list[tuple[object, ...]]
) -> None:
    run = Run(steps, size, total)
    for name, *arguments in order:
        getattr(run, str(name))(*arguments)
        run.check()
    while len(run.used) < total * size or run.learning:  # and the run ends from wherever it is
        before = (run.window.step, run.window.counts(), dict(run.work), run.learning)
        for event in (
            run.begin,
            run.finish,
            run.take,
            run.begin,
            run.finish,
        ):  # with engines that are as fast as can be
            for count in range(9):
                event(*([] if event == run.take else [count]))
        run.learn(True)
        run.check()
        assert (run.window.step, run.window.counts(), run.work, run.learning) != before, "it stands still"
    run.begin(1)
    assert not run.work and len(run.used) == total * size, "nothing is begun that no step will use"


def test_engines_that_are_far_ahead_fill_the_window_and_reach_its_bound() -> None:
    run = Run(steps=3, size=4, total=9)
    for _ in range(9):
        run.begin(20)
        for _ in range(20):
            run.finish(0)
        run.take()
        run.begin(20)
        for _ in range(20):
            run.finish(1)
        assert run.window.counts() == (0, 4 * min(3, 9 - run.window.step))
        run.learn(True)
    by_step = [run.ages[4 * step : 4 * step + 4] for step in range(9)]
    assert by_step == [[min(step, 3)] * 4 for step in range(9)], "steps 0 to 3 were begun before the first publication"


def test_each_step_taken_makes_room_for_as_many_prompts() -> None:
    window: Window[str] = Window(2, 3, 9, 0)
    begun = [window.next() for _ in range(8)]
    assert begun == [0, 1, 2, 3, 4, 5, None, None]
    for number in (5, 0, 2, 1):
        window.finish(number, f"to {number}")
    assert window.ready() and window.take() == ["to 0", "to 1", "to 2"]
    assert [window.next() for _ in range(4)] == [6, 7, 8, None]
    assert window.answered() == {5: "to 5"} and window.counts() == (5, 1) and not window.ready()


def test_what_was_not_begun_or_is_answered_already_is_refused() -> None:
    window: Window[str] = Window(1, 2, 5, 1)
    assert window.next() == 2
    window.finish(2, "x")
    for number in (2, 3, 1):
        with pytest.raises(ValueError, match=f"prompt {number} was not begun, or is answered already"):
            window.finish(number, "y")
    with pytest.raises(ValueError, match="step 1 has not all its answers"):
        window.take()
    with pytest.raises(ValueError, match="a window of 0 steps of 4 prompts"):
        Window(0, 4, 5, 0)
