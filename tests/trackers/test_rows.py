"""A curve has each step once, in rising order, whole, and only what no resume undoes; live, what each attempt has logged."""

from __future__ import annotations

import random
from typing import Any

import pytest

from rlhf_ray.trackers.rows import RUN, Record, Row, rows_of, sendable


def line(step: int, at: float, **values: float | None) -> dict[str, Any]:
    return {"step": step, "timestamp": at, **values}


def test_lines_of_one_step_are_one_row_of_finite_numbers_in_order() -> None:
    lines = [line(2, 5.0, a=1.0, b=None), line(1, 4.0, a=0.5), line(2, 6.0, c=3, a=9.0)]
    assert rows_of(lines) == [Row(1, 4.0, {"a": 0.5}), Row(2, 5.0, {"a": 1.0, "c": 3.0})]


def steps(record: Record, *, over: bool, live: bool = False) -> dict[str, list[int]]:
    return {key: [row.step for row in rows] for key, rows in sendable(record, live=live, over=over).items()}


SIX = [line(step, float(step)) for step in range(1, 7)]


@pytest.mark.parametrize(
    ("record", "over", "expected"),
    [
        (Record(SIX), False, []),
        (Record(SIX, committed=4), False, [1, 2, 3, 4]),
        (Record(SIX, committed=6), False, [1, 2, 3, 4, 5]),  # the evaluation of step 6 may still come
        (Record(SIX, committed=6), True, [1, 2, 3, 4, 5, 6]),
        (Record(SIX, committed=6, trained=6), True, [1, 2, 3, 4, 5]),  # the last evaluation is still missing
        (Record(SIX, committed=6, trained=6, finished=True), True, [1, 2, 3, 4, 5, 6]),
        (Record(SIX, committed=4), True, [1, 2, 3, 4]),
        (Record(SIX, committed=-1, finished=True), True, [1, 2, 3, 4, 5, 6]),
        (Record([], committed=-1), True, []),
    ],
)
def test_what_is_committed_and_whole_is_sent(record: Record, over: bool, expected: list[int]) -> None:
    assert steps(record, over=over) == {RUN: expected}


def test_each_attempt_is_a_curve_of_its_own_with_what_was_undone() -> None:
    lines = [line(1, 11.0), line(2, 12.0), line(3, 22.0), line(4, 23.0)]
    void = [line(3, 13.0), line(4, 14.0)]
    record = Record(lines, void, starts=[10.0, 21.0], committed=2)
    assert steps(record, over=True, live=True) == {"attempt-1": [1, 2, 3, 4], "attempt-2": [3, 4]}
    assert steps(record, over=False, live=True) == {"attempt-1": [1, 2, 3, 4], "attempt-2": [3]}
    assert steps(Record([], starts=[10.0]), over=False, live=True) == {"attempt-1": []}


def test_a_step_that_an_attempt_does_again_keeps_its_first_values_live() -> None:
    record = Record([line(1, 11.0, a=1.0), line(2, 14.0, a=5.0)], [line(2, 12.0, a=2.0)], starts=[10.0])
    assert [row.values["a"] for row in sendable(record, live=True, over=True)["attempt-1"]] == [1.0, 2.0]


class Run:
    """The record of a run under random steps, evaluations, commits, crashes and resumes."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.lines: list[dict[str, Any]] = []
        self.void: list[dict[str, Any]] = []
        self.starts = [0.0]
        self.step, self.committed, self.now = 0, -1, 0.0
        self.finished = False

    def act(self) -> bool:
        """Do something; returns whether the run is over for now."""
        self.now += 1.0
        action = self.random.choice(["step", "step", "step", "evaluate", "commit", "crash"])
        if action == "step":
            self.step += 1
            self.lines.append(line(self.step, self.now, loss=self.now))
        elif action == "evaluate" and self.step:
            self.lines.append(line(self.step, self.now, evaluation=self.now))
        elif action == "commit" and self.step:
            self.committed = self.step
        return action == "crash"

    def go_on(self) -> None:
        self.now += 1.0
        self.step = max(self.committed, 0)
        self.void += [one for one in self.lines if one["step"] > self.step]
        self.lines = [one for one in self.lines if one["step"] <= self.step]
        self.starts.append(self.now)

    def record(self) -> Record:
        return Record([*self.lines], [*self.void], [*self.starts], self.committed, None, self.finished)


@pytest.mark.parametrize("live", [False, True])
def test_whatever_a_run_goes_through_and_whenever_one_looks_each_step_is_sent_once_as_it_is_in_the_end(
    live: bool,
) -> None:
    voided = 0
    for seed in range(150):
        run, sent = Run(seed), dict[str, list[Row]]()

        def send(over: bool, run: Run = run, sent: dict[str, list[Row]] = sent) -> None:
            for key, rows in sendable(run.record(), live=live, over=over).items():
                got = sent.setdefault(key, [])
                got += [row for row in rows if not got or row.step > got[-1].step]

        for _ in range(120):
            if run.act():
                if run.random.random() < 0.7:
                    send(over=True)
                run.go_on()
            elif run.random.random() < 0.3:
                send(over=False)
        run.finished = True
        send(over=True)
        voided += len(run.void)
        if not live:
            assert [row.step for row in sent[RUN]] == list(range(1, run.step + 1))
            final = {row.step: row for row in rows_of(run.lines)}
            # An evaluation that is logged after a crash for a step that was sent at that crash comes too late.
            assert all(final[row.step].values["loss"] == row.values["loss"] for row in sent[RUN])
        else:
            assert sum(map(len, sent.values())) == len(
                {
                    (sum(start <= one["timestamp"] for start in run.starts), one["step"])
                    for one in [*run.lines, *run.void]
                }
            )
    assert voided > 1000, "resumes have undone something"
