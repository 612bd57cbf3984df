"""``rlhf-ray serve`` as an operator runs it: it prints its address, answers only who has the token, scores as the model does
in any process, and leaves nothing behind when it is told to stop.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from rlhf_ray.network import outward_address
from rlhf_ray.rewards import RewardClient, ScoreRequest
from tests.e2e.conftest import command_lines, listening_beyond_loopback

from ..serving.reward_models import BOS, EOS, MEAN, STD, Reference, save_reward_model

ROOT = Path(__file__).parents[2]
TOKEN = "token-of-this-test"
MARK = "RLHF_RAY_TEST_MARK"
TEXTS = [f"{BOS}why? because.{EOS}", "  spaces kept ", "ünï", "a" * 100]
START_S, STOP_S = 120, 60


@dataclass(frozen=True)
class Service:
    """A running command."""

    process: subprocess.Popen[str]
    address: str
    log: Path
    mark: str

    def processes(self) -> list[psutil.Process]:
        """Everything that it started and that lives, itself included."""
        return [process for process in psutil.process_iter() if self._mine(process)]

    def _mine(self, process: psutil.Process) -> bool:
        try:
            return process.environ().get(MARK) == self.mark
        except psutil.Error:
            return False


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reward_model(tmp_path_factory.mktemp("reward"))


@pytest.fixture(scope="module")
def service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """The command, ready; ended by force where the test did not end it."""
    directory = tmp_path_factory.mktemp("service")
    tokens, log, mark = directory / "tokens", directory / "log", uuid.uuid4().hex
    tokens.write_text(f"test:{TOKEN}\n")
    options = ["--host", "0.0.0.0", "port=0", "cluster.num_cpus=1", "cluster.object_store_mb=80", "run.name=serve-test"]
    command = [sys.executable, "-m", "rlhf_ray", "serve", str(model), "--token-file", str(tokens), *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command, cwd=ROOT, env={**environment, MARK: mark}, stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    try:
        yield Service(process, read_address(process, log), log, mark)
    finally:
        process.kill()
        process.wait(timeout=STOP_S)


def read_address(process: subprocess.Popen[str], log: Path) -> str:
    """The line of standard output that holds nothing but an address."""
    assert process.stdout is not None
    began = time.monotonic()
    for line in process.stdout:
        if line.startswith("http"):
            assert time.monotonic() - began < START_S
            return line.strip()
    pytest.fail(f"serve ended without an address:\n{log.read_text()}")


def test_nothing_but_the_port_asked_for_listens_beyond_this_machine(service: Service) -> None:
    """Ray's ports, the rendezvous of the ranks and the metrics agents included; others reach it at the address it prints."""
    host, _, port = service.address.removeprefix("http://").partition(":")
    assert host == outward_address()
    open_ports = listening_beyond_loopback(service.processes())
    assert {number for _, number in open_ports} == {int(port)}, open_ports


def test_it_serves_the_models_scores_and_leaves_nothing(service: Service, model: Path) -> None:
    reference = Reference(model)
    expected = [pytest.approx(reference.of_text(text), rel=0, abs=1e-5) for text in TEXTS]
    as_openrlhf = {"query": TEXTS, "prompts": TEXTS, "labels": [None] * len(TEXTS)}

    with httpx.Client(base_url=service.address, timeout=30) as stranger:
        assert stranger.get("/ready").status_code == 200
        assert stranger.get("/health").status_code == 200
        assert stranger.post("/get_reward", json=as_openrlhf).status_code == 401
        assert stranger.get("/metrics").status_code == 401

    with_password = service.address.replace("http://", f"http://x:{TOKEN}@")
    answer = httpx.post(f"{with_password}/get_reward", json=as_openrlhf, timeout=30).json()
    assert answer == {"rewards": expected, "scores": expected, "extra_logs": {}}

    ids = tuple(reference.tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"])
    with RewardClient(with_password) as client:
        by_ids, bad = client.score([ScoreRequest(token_ids=ids), ScoreRequest(token_ids=(10**6,))])
    assert by_ids.raw == expected[0]
    assert by_ids.reward == pytest.approx((by_ids.raw - MEAN) / STD)
    assert "outside the reward model's vocabulary" in str(bad.error)

    assert any("RewardModelActor" in line for line in command_lines(service.processes())), (
        "a reward actor of Ray scores"
    )
    service.process.send_signal(signal.SIGTERM)
    assert service.process.wait(timeout=STOP_S) == 0, service.log.read_text()
    assert gone(service) == []
    log = service.log.read_text()
    assert TOKEN not in log and "because" not in log and "Traceback" not in log


def gone(service: Service) -> list[str]:
    """What is left once processes that were told to end had time to."""
    deadline = time.monotonic() + 10
    while (left := command_lines(service.processes())) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left
