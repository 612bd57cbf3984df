"""``python -m tests.monitoring.alarms.prometheus_run [--prometheus PROGRAM]``: faults of a real run, seen by a real Prometheus.

A PPO run on a Ray cluster of its own is scraped with ``deploy/monitoring/prometheus.yml`` and its rules. A rollout engine is
killed, and later the reward function fails. Printed is what ``status`` and Prometheus said, how many seconds apart, and which
queries of panels had data. It ends with 1 if one of them said anything else than the alarm of the fault, or Prometheus
said it more than 60 s after ``status``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rlhf_ray import environment, network
from rlhf_ray.monitoring.dashboards import dashboard
from rlhf_ray.processes import stacks
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.reporting import alarms

ROOT = Path(__file__).parents[3]
DEPLOY = ROOT / "deploy" / "monitoring"
LIMIT_S = 60.0
JUDGE = """
import pathlib

def lengths(responses):
    if pathlib.Path(__file__).with_name("away").exists():
        raise ConnectionError("the judge is away")
    return [float(len(response)) for response in responses]
"""


class Prometheus:
    """A Prometheus that scrapes one page with the project's configuration."""

    def __init__(self, program: str, page: str, directory: Path) -> None:
        (directory / "targets.json").write_text(json.dumps([{"targets": [page], "labels": {"job": "ray"}}]))
        config = (DEPLOY / "prometheus.yml").read_text()
        config = config.replace("/tmp/ray/prom_metrics_service_discovery.json", str(directory / "targets.json"))
        (directory / "prometheus.yml").write_text(config)
        shutil.copy(DEPLOY / "rlhf_ray_rules.yml", directory)
        port = network.free_port("127.0.0.1")
        self.url = f"http://127.0.0.1:{port}"
        command = [program, f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data",
                   f"--web.listen-address=127.0.0.1:{port}"]  # fmt: skip
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=(directory / "prometheus.log").open("w")
        )

    def query(self, text: str) -> list[dict[str, dict[str, str]]]:
        """The samples of an expression now; none while it does not answer."""
        address = f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': text})}"
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                found: list[dict[str, dict[str, str]]] = json.load(answer)["data"]["result"]
                return found
        except OSError:
            return []

    def firing(self) -> set[str]:
        """The alarms that hold."""
        return {one["metric"]["alertname"] for one in self.query('ALERTS{alertstate="firing"}')}

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(30)


@contextmanager
def cluster() -> Iterator[tuple[str, str]]:
    """A Ray cluster: its address, and that of its page of metrics."""
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(environment.for_process())
    import ray

    context = ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    node = ray.nodes()[0]
    try:
        yield context.address_info["gcs_address"], f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}"
    finally:
        ray.shutdown()


def wait(what: str, holds: Callable[[], bool], limit_s: float) -> float:
    """Seconds until something holds; a ``TimeoutError`` where it does not in time."""
    began = time.monotonic()
    while not holds():
        if time.monotonic() - began > limit_s:
            raise TimeoutError(f"{what}: not within {limit_s:g} s")
        time.sleep(0.5)
    return time.monotonic() - began


def fault(prometheus: Prometheus, run: RunDirectory, expected: str, cause: Callable[[], None]) -> list[str]:
    """Cause a fault; what is wrong about what was said of it."""
    said: dict[str, set[str]] = {"status": set(), "Prometheus": set()}
    began, times = time.monotonic(), dict[str, float]()
    cause()
    while len(times) < 2 and time.monotonic() - began < 180:
        for where, names in (("status", {one.alarm.name for one in alarms(run)}), ("Prometheus", prometheus.firing())):
            alarming = {name for name in names if name in {expected} or name not in BEFORE}
            said[where] |= alarming
            if expected in names:
                times.setdefault(where, time.monotonic() - began)
        time.sleep(0.5)
    BEFORE.add(expected)
    shown = ", ".join(f"{where} after {seconds:.1f} s" for where, seconds in times.items())
    print(f"| {expected} | {shown} | said: {said} |", flush=True)
    wrong = [f"{where} said {names}, not {expected}" for where, names in said.items() if names != {expected}]
    if len(times) == 2 and times["Prometheus"] - times["status"] > LIMIT_S:
        wrong.append(f"{expected}: Prometheus was {times['Prometheus'] - times['status']:.0f} s later")
    return wrong


BEFORE: set[str] = set()
"""Alarms of earlier faults, which may still hold."""


def panels(prometheus: Prometheus) -> tuple[int, int]:
    """How many queries of panels have data, and how many there are."""
    texts = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    asked = [text.replace('"$run"', '".+"').replace("$__rate_interval", "1m") for text in texts]
    return sum(bool(prometheus.query(text)) for text in asked), len(asked)


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", default=shutil.which("prometheus"), help="the program; Debian's package has it")
    program = parser.parse_args().prometheus
    if program is None:
        parser.error("prometheus is not installed: apt-get install prometheus, or name the program with --prometheus")
    wrong: list[str] = []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (directory / "judge.py").write_text(JUDGE)
        address, page = stack.enter_context(cluster())
        prometheus = Prometheus(program, page, directory)
        stack.callback(prometheus.close)
        command = [sys.executable, "-m", "rlhf_ray", "train", "ppo", str(ROOT / "tests/e2e/ppo_tiny.yaml"), "steps=4000",
                   f"run.root={directory}", f"cluster.address={address}", "rollout.backend=transformers", "policy.ranks=1",
                   "policy.engine.zero=1", "checkpoint.every_steps=50", "evaluation.prompts=4", "run.deterministic=false",
                   f"reward={{function: '{directory}/judge.py:lengths', hold_s: 300}}"]  # fmt: skip
        driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=(directory / "log").open("w"))
        stack.callback(driver.wait, 60)
        stack.callback(driver.send_signal, signal.SIGTERM)
        path = directory / "tiny"
        try:
            wait(
                "three steps",
                lambda: (path / "metrics.jsonl").exists() and len(RunDirectory(path).metrics.read()) > 3,
                600,
            )
            run = RunDirectory.open(path)
            wait("metrics in Prometheus", lambda: bool(prometheus.query("ray_rlhf_step > 2")), 90)
            print("before:", {one.alarm.name for one in alarms(run)}, prometheus.firing(), flush=True)
            (engine,) = [one.pid for one in stacks.labelled("rlhf/tiny/rollout/1")][:1]
            wrong += fault(prometheus, run, "EngineLost", lambda: os.kill(engine, signal.SIGKILL))
            wrong += fault(prometheus, run, "RewardFailing", (directory / "away").touch)
            (directory / "away").unlink()
            seconds = wait("the way out", lambda: "RewardFailing" not in prometheus.firing(), 300)
            print(f"RewardFailing was over in Prometheus {seconds:.0f} s after the function was mended", flush=True)
            with_data, every = panels(prometheus)
            print(f"{with_data} of {every} queries of panels have data; firing: {prometheus.firing()}", flush=True)
        except (TimeoutError, ValueError) as error:
            wrong.append(f"{error}\n{(directory / 'log').read_text()[-3000:]}")
    for one in wrong:
        print("WRONG:", one)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
