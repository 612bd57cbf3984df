"""The figures of commits, from the seconds of steps that are known."""

from __future__ import annotations

import pytest

from benchmarks.checkpoints import saves, share_of_time, stall


def test_the_share_is_what_commits_make_their_update_and_the_next_ones_longer() -> None:
    late = {"time/step": 1.05}
    plain, saved, beside, last = {"time/step": 1.0}, {"time/step": 1.2, "time/checkpoint": 0.15}, {"time/step": 1.1}, {
        "time/step": 9.0, "time/checkpoint": 8.0
    }  # fmt: skip
    steps = [plain, saved, beside, late, plain, plain, saved, beside, late, last]
    assert saves(steps) == 2 and stall(steps) == 0.15, "that of the end is not on the way"
    assert share_of_time(steps) == pytest.approx(2 * 0.35 / (3 * 1.0 + 2 * 1.2 + 2 * 1.1 + 2 * 1.05 + 9.0))
