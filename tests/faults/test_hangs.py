"""An engine of a real run that hangs, because its process was stopped while it sampled: it is found out and replaced."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests.faults import kills


@pytest.mark.long
@pytest.mark.timeout(400)
def test_an_engine_that_hangs_is_ended_and_replaced_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kill, stopped = os.kill, list[int]()

    def noting(pid: int, number: int) -> None:
        if number == signal.SIGSTOP:
            stopped.append(pid)
        kill(pid, number)

    monkeypatch.setattr(os, "kill", noting)
    done = kills.campaign(tmp_path, 1, 0, blow=signal.SIGSTOP)
    assert +done == Counter(generating=1) and len(stopped) == 1
    assert not psutil.pid_exists(stopped[0]), "a process that hangs is not left behind"
