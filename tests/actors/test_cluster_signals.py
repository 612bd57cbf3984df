"""Ray changes nothing of how a process takes signals, and its parent knows the outcome of the work before Ray is left.

Ray itself is replaced by what it does to the process; ``python -m tests.faults.endings`` shows the same with the real one.
"""

from __future__ import annotations

import io
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from rlhf_ray.actors import cluster
from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.config.sections.run import ClusterConfig, RunConfig
from rlhf_ray.errors import GroupError, ResumableStop
from rlhf_ray.launch.driver import exit_code
from rlhf_ray.processes import lifeline
from rlhf_ray.processes.interrupts import SIGNALS

said: list[bytes] = []


def heard(line: socket.socket) -> bytes:
    """What was said and not heard yet."""
    line.setblocking(False)
    try:
        return line.recv(64)
    except BlockingIOError:
        return b""


@pytest.fixture(autouse=True)
def parent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[socket.socket]:
    """The parent's end of the line; ``said`` is what it has heard when Ray begins to shut down."""
    ours, theirs = socket.socketpair()
    said.clear()
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(lifeline, "_line", theirs)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "available_resources", lambda: {"CPU": 1.0})

    def init(**options: Any) -> Any:
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(number))
        page = {"node_ip_address": "127.0.0.1", "metrics_export_port": 1, "session_dir": str(tmp_path / "session")}
        return SimpleNamespace(address_info=page)

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: said.append(heard(ours)))
    monkeypatch.setattr(cluster, "warn_if_taken", lambda: said.append(b"port looked at"))
    with ours, theirs:
        yield ours


def test_a_process_takes_signals_as_before_once_ray_has_started() -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with Cluster(ClusterConfig(num_cpus=1), RunConfig(name="run")):
        assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(
    ("error", "code"),
    [(None, 0), (ResumableStop("stopped"), 75), (GroupError("policy", 0, "save", "died"), 1), (KeyError(), 1)],
)
def test_the_parent_knows_the_outcome_before_ray_is_left_and_that_it_was_left_after(parent, error, code) -> None:
    try:
        with Cluster(ClusterConfig(num_cpus=1), RunConfig(name="run")):
            if error is not None:
                raise error
    except type(error or Exception):
        pass
    assert said == [b"port looked at", bytes([code])]
    assert heard(parent) == lifeline.LEFT


def test_an_error_that_is_told_before_ray_is_left_is_told_once(
    project_log: io.StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_ray.trainers.stopping.listen", lambda: None)

    def work() -> None:
        with Cluster(ClusterConfig(num_cpus=1), RunConfig(name="run")):
            raise GroupError("policy", 0, "save", "it died")

    assert exit_code(work) == 1
    assert project_log.getvalue().count("it died") == 1
