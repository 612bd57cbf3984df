"""A rank of every role is killed at its work in a run on a real Ray, whose driver and other groups go on to the same bits."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from tests.faults.useful_time import WORK, draw


@pytest.mark.long
def test_a_lost_group_is_back_within_20_seconds_and_the_run_ends_in_the_same_bits() -> None:
    done = subprocess.run([sys.executable, "-m", "tests.faults.groups"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    back = re.search(r"back within ([\d.]+) s", done.stdout)
    assert back is not None and float(back[1]) < 20.0, done.stdout


def test_the_kills_that_are_drawn_are_in_steps_of_their_own_and_meet_work_of_their_role() -> None:
    for seed in range(20):
        due = draw(60, 6, seed)
        assert len(due) == 6 and all(1 < step < 60 and call in WORK[role] for step, (role, call) in due.items())
        assert due == draw(60, 6, seed)
