"""Only what comes from outside is progress, and a wait with a deadline of its own until that has passed."""

from __future__ import annotations

import time

import pytest

from rlhf_ray.processes import progress


def test_a_wait_counts_until_its_deadline_and_its_end_is_progress() -> None:
    progress.made()
    before = progress.made_at()
    time.sleep(0.02)
    assert progress.made_at() == before
    with progress.waiting(60.0):
        assert progress.made_at() == pytest.approx(time.monotonic(), abs=0.01)
        with progress.waiting(0.01):
            time.sleep(0.05)
            assert progress.made_at() == pytest.approx(time.monotonic(), abs=0.01), "the longer one has time left"
    ended = progress.made_at()
    assert ended > before
    with progress.waiting(0.01):
        time.sleep(0.05)
        late = progress.made_at()
    assert ended < late < time.monotonic() - 0.02, "one that does not end at its deadline hangs"
