"""A served reward model whose group is killed again and again under the load of OpenRLHF's client.

    python -m tests.faults.serving [--restarts 20]

Always true, or the campaign says so: no reward is lost and none is wrong, by the rules of that client (one text a request,
five tries a second apart, 180 s each), which trains on nothing where it gives up.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
import psutil

from rlhf_ray import environment
from rlhf_ray.actors.cluster import SERVICE_NAMESPACE, Cluster
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.sections.engine import ResourcesConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.config.sections.run import ClusterConfig, RunConfig
from rlhf_ray.serving.cluster_client import find_service, gateway_name
from tests.serving.reward_models import Reference, save_reward_model

TRIES, SECONDS_BETWEEN_TRIES, TIMEOUT_S = 5, 1.0, 180.0
ASKERS = 8
TOLERANCE = 1e-5
LIMIT_S = 120.0


@contextmanager
def gateway(model: Path, name: str) -> Iterator[str]:
    """A service on a Ray that this process starts and is a job of; its address."""
    from rlhf_ray.serving.gateway import GatewayActor

    role = ScoringRole(model=ModelConfig(path=str(model), dtype="fp32"), resources=ResourcesConfig(cpus_per_rank=0.2))
    cluster = ClusterConfig(num_cpus=1, object_store_mb=80)
    config = ServeConfig(kind="serve", run=RunConfig(name=name), cluster=cluster, reward=role, port=0)
    with Cluster(config.cluster, config.run, namespace=SERVICE_NAMESPACE):
        runtime = {"env_vars": environment.for_process()}
        actor = GatewayActor.options(name=gateway_name(name), namespace=SERVICE_NAMESPACE, runtime_env=runtime).remote(
            config
        )
        service = find_service(name, timeout_s=LIMIT_S)
        yield service.call("start", [()]).result()[0]
        service.call("stop", [()]).result()
        del actor


def reward_processes() -> list[int]:
    """Process ids of the reward ranks that live: this process started their Ray."""
    children = psutil.Process().children(recursive=True)
    return [child.pid for child in children if "RewardModelActor" in command_of(child)]


def command_of(process: psutil.Process) -> str:
    """The command line of a process; nothing where it has just ended."""
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def ask(address: str, text: str) -> float | None:
    """One reward, by the rules of OpenRLHF's client; none where it gives up."""
    for _ in range(TRIES):
        try:
            answer = httpx.post(f"{address}/get_reward", json={"query": [text]}, timeout=TIMEOUT_S)
            return float(answer.raise_for_status().json()["rewards"][0])
        except (httpx.HTTPError, ValueError, KeyError):
            time.sleep(SECONDS_BETWEEN_TRIES)
    return None


@dataclass
class Finding:
    """What came of all requests."""

    kills: int = 0
    asked: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.kills} kills, {self.asked} rewards asked for, {len(self.lost)} lost, {len(self.wrong)} wrong"


def campaign(address: str, model: Path, restarts: int) -> Finding:
    """Kill the group so often while clients ask."""
    reference, finding, over, lock = Reference(model), Finding(), threading.Event(), threading.Lock()

    def asker(number: int) -> None:
        count = 0
        while not over.is_set():
            count += 1
            text = f"asker {number}, text {count}"
            reward = ask(address, text)
            with lock:
                finding.asked += 1
                if reward is None:
                    finding.lost.append(text)
                elif abs(reward - reference.of_text(text)) > TOLERANCE:
                    finding.wrong.append(text)

    with ThreadPoolExecutor(ASKERS) as pool:
        asking = [pool.submit(asker, number) for number in range(ASKERS)]
        try:
            for _ in range(restarts):
                _kill_once_it_answers(finding)
            _wait_for_answers(finding)
        finally:
            over.set()
        for one in asking:
            one.result(timeout=TIMEOUT_S)
    return finding


def _kill_once_it_answers(finding: Finding) -> None:
    _wait_for_answers(finding)
    for victim in reward_processes():
        os.kill(victim, signal.SIGKILL)
    finding.kills += 1


def _wait_for_answers(finding: Finding) -> None:
    """Until rewards come again: twice as many as can be under way, so that the group that gave them is the newest."""
    enough, deadline = finding.asked + 2 * ASKERS, time.monotonic() + LIMIT_S
    while finding.asked < enough:
        if time.monotonic() > deadline:
            raise AssertionError(f"no rewards for {LIMIT_S:g} s after: {finding}")
        time.sleep(0.02)


def main() -> None:
    """The long form."""
    parser = argparse.ArgumentParser(prog="tests.faults.serving", description="kill a served reward group under load")
    parser.add_argument("--restarts", type=int, default=20)
    options = parser.parse_args()
    environment.prepare()
    with TemporaryDirectory() as name:
        model = save_reward_model(Path(name))
        with gateway(model, "faults") as address:
            finding = campaign(address, model, options.restarts)
    print(finding)
    raise SystemExit(bool(finding.lost or finding.wrong))


if __name__ == "__main__":
    main()
