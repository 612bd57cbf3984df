"""The window of the mode ``windowed``, over every order of events.

What must hold, whatever the engines and the trainer do when: no answer is older than the window when its step learns; each step
gets its own prompts, each once; a trainer that waits is never waited for in turn; a resume keeps what was finished.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.trainers.ppo.modes.window import Slice, Window

Answer = tuple[int, int]
"""The number of a slice's first prompt and the version that sampled it."""


class Run:
    """A trainer, engines and a checkpoint, driven one event at a time; every claim is asserted as it goes."""

    def __init__(self, steps: int, size: int, total: int) -> None:
        self.steps, self.size, self.total = steps, size, total
        self.window: Window[int] = Window(steps, size, total, 0)
        self.work: Slice | None = None
        self.version = 0
        self.begun_at = 0
        self.learning: list[tuple[Slice, int]] | None = None
        self.used: list[int] = []
        self.ages: list[int] = []
        self.checkpoint: tuple[int, int, list[tuple[Slice, int]]] = (0, 0, [])

    def begin(self, most: int) -> None:
        if self.work is None:
            self.work, self.begun_at = self.window.next(most), self.version

    def finish(self) -> None:
        if self.work is not None:
            self.window.finish(self.work, self.begun_at)
            self.work = None

    def take(self) -> None:
        if self.learning is None and self.window.ready():
            self.learning = self.window.take()
            for one, version in self.learning:
                self.used += range(one.first, one.first + one.prompts)
                self.ages.append(self.version - version)

    def learn(self, applied: bool) -> None:
        """A step has learned; it is published once the slice in work has ended, and committed."""
        if self.learning is not None:
            self.finish()
            self.learning = None
            self.version += applied
            self.checkpoint = (self.window.step, self.version, self.window.kept())

    def resume(self) -> None:
        """The process was killed: only the checkpoint is left."""
        step, self.version, kept = self.checkpoint
        self.used, self.work, self.learning = self.used[: step * self.size], None, None
        self.window = Window(self.steps, self.size, self.total, step)
        self.window.restore(kept)

    def check(self) -> None:
        assert self.used == list(range(len(self.used))), "every prompt once, in order"
        assert max(self.ages, default=0) <= self.steps


events = st.one_of(
    st.tuples(st.just("begin"), st.integers(1, 7)),
    st.tuples(st.just("finish")),
    st.tuples(st.just("take")),
    st.tuples(st.just("learn"), st.booleans()),
    st.tuples(st.just("resume")),
)


@given(st.integers(1, 4), st.integers(1, 5), st.integers(1, 6), st.lists(events, max_size=80))
def test_no_answer_is_older_than_the_window_and_every_prompt_is_used_once(
    steps: int, size: int, total: int, order: list[tuple[object, ...]]
) -> None:
    run = Run(steps, size, total)
    for name, *arguments in order:
        getattr(run, str(name))(*arguments)
        run.check()
    while len(run.used) < total * size or run.learning is not None:  # and the run ends from wherever it is
        before = (run.window.step, run.window.counts(), run.work, run.learning is None)
        run.begin(3)
        run.finish()
        run.take()
        run.learn(True)
        run.check()
        assert (run.window.step, run.window.counts(), run.work, run.learning is None) != before, "it stands still"
    run.begin(1)
    assert run.work is None and len(run.used) == total * size, "nothing is begun that no step will use"


def test_engines_that_are_far_ahead_fill_the_window_and_reach_its_bound() -> None:
    run = Run(steps=3, size=4, total=9)
    for _ in range(9):
        for _ in range(20):
            run.begin(2)
            run.finish()
        run.take()
        for _ in range(20):
            run.begin(2)
            run.finish()
        assert run.window.counts() == (0, 4 * min(3, 9 - run.window.step))
        run.learn(True)
    assert run.ages == [0, 0, 1, 1, 2, 2, *[3] * 12], "steps 0 to 2 were begun before the first publication"


def test_a_slice_that_is_lost_leaves_no_gap_in_what_is_kept() -> None:
    window: Window[str] = Window(2, 4, 5, 0)
    slices = [window.next(2) for _ in range(3)]
    assert [one and (one.step, one.first) for one in slices] == [(0, 0), (0, 2), (1, 4)]
    for one in (slices[0], slices[2]):
        assert one is not None
        window.finish(one, f"answers from {one.first}")
    assert [answers for _, answers in window.kept()] == ["answers from 0"] and not window.ready()
    assert window.counts() == (2, 4)


def test_sizes_that_no_step_could_begin_with_are_refused() -> None:
    with pytest.raises(ValueError, match="a window of 0 steps of 4 prompts"):
        Window(0, 4, 5, 0)
    with pytest.raises(ValueError, match="does not follow prompt 3"):
        Window[str](1, 4, 5, 1).restore([(Slice(1, 6, 2), "x")])
