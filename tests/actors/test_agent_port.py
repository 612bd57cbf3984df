"""A run that takes the port of a cluster's job agent says so, and only then."""

from __future__ import annotations

import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path

import pytest

from rlhf_ray.actors import agent_port


@pytest.fixture
def port() -> int:
    """One that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[subprocess.Popen[bytes]]:
    """A process with the name of a cluster's node, and no other is looked for."""
    monkeypatch.setattr(agent_port, "NODE", "other-raylet")
    process = subprocess.Popen([shutil.copy("/bin/sleep", tmp_path / agent_port.NODE), "60"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize("address", [None, "", "127.0.0.1"], ids=["free", "taken", "taken on loopback"])
@pytest.mark.parametrize("beside", [True, False], ids=["beside a node", "alone"])
def test_a_run_says_that_it_takes_the_port_only_where_a_node_lacks_it(node, port, project_log, address, beside):
    if not beside:
        node.kill()
        node.wait()
    taken = nullcontext() if address is None else closing(socket.create_server((address, port)))
    with taken:
        agent_port.warn_if_taken(port)
    said = project_log.getvalue()
    assert (f"takes port {port}" in said and "--dashboard-agent-listen-port" in said) == (beside and address is None)
