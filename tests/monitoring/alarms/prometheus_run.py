"""``python -m tests.monitoring.alarms.prometheus_run [--prometheus PROGRAM] [--draw DIRECTORY]``: real runs, a real Prometheus.

A PPO run, a service under load and the training of a reward model, all of them on one Ray cluster, are scraped with
``deploy/monitoring/prometheus.yml`` and its rules. In the PPO run a rank is stopped for a while, an update meets NaN, the disk
of the run has no room for a while (for root alone: it mounts a small one), an engine is killed, later the reward function
fails, and later it does not answer; at the end the service is killed. Printed is what ``status`` and Prometheus said and how
many seconds apart, and which expressions of panels and rules had data in none of the three. It ends with 1 if one of them said
anything else than the alarm of the fault, if Prometheus said it more than 60 s after ``status``, or if an expression had no
data that needs neither an option nor a fault (``rlhf_ray/monitoring/appearance.py``). With ``--draw`` every dashboard is drawn
from Prometheus' answers.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import httpx

from rlhf_ray import environment, network
from rlhf_ray.monitoring.alarms.service import DOWN_S
from rlhf_ray.monitoring.dashboards import BOARDS
from rlhf_ray.processes import stacks
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.reporting import alarms
from tests.monitoring.alarms.drawn_boards import draw
from tests.monitoring.alarms.prometheus import Coverage, Prometheus, appears, expressions
from tests.serving.reward_models import save_reward_model

ROOT = Path(__file__).parents[3]
LIMIT_S = 60.0
JUDGE = """
import pathlib
import time

def lengths(responses):
    here = pathlib.Path(__file__)
    while here.with_name("stuck").exists():
        time.sleep(0.1)
    if here.with_name("away").exists():
        raise ConnectionError("the judge is away")
    return [float(len(response)) for response in responses]
"""
OBJECTIVE = """
import pathlib

class Clipped:
    # PPO's clipped objective, which gives NaN once for each file named poison
    def __call__(self, log_probs, log_ratio, advantages):
        ratio = log_ratio.exp()
        plain, clipped = ratio * advantages, ratio.clamp(0.8, 1.2) * advantages
        poison = pathlib.Path(__file__).with_name("poison")
        if poison.exists():
            poison.unlink()
            plain = plain * float("nan")
        return plain.minimum(clipped), clipped < plain
"""
DISK_MB = 800
LEFT_MB = 40
"""Less than an alarm's 100 MB, and enough to log: the alarm comes before the run ends for want of space."""


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


def start(directory: Path, name: str, *words: str) -> subprocess.Popen[bytes]:
    """A command of the project, which writes to a log of its own."""
    command = [sys.executable, "-m", "rlhf_ray", *words]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=(directory / f"{name}.log").open("w"))


def ended(process: subprocess.Popen[bytes]) -> None:
    """End a run or a service in order, or else at once."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(90)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait(10)


class Load(threading.Thread):
    """Callers of a service: good requests, and from time to time one that it refuses, or an item that it cannot score."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._url, self._over = f"{url}/v1/reward", threading.Event()

    def run(self) -> None:
        """Ask until :meth:`stop`."""
        good = {"items": [{"text": f"a text {number}"} for number in range(8)]}
        bodies: list[dict[str, object]] = [good, {"items": [{"text": "a"}, {"text": ""}]}, {}]
        with httpx.Client(timeout=30) as client:
            while not self._over.wait(0.2):
                for body in bodies:
                    with suppress(httpx.HTTPError):
                        client.post(self._url, json=body)

    def stop(self) -> None:
        """Ask no more."""
        self._over.set()
        self.join(30)


def steps(path: Path) -> int:
    """How many steps a run has logged."""
    return len(RunDirectory(path).metrics.read()) if (path / "metrics.jsonl").exists() else 0


@contextmanager
def small_disk(directory: Path) -> Iterator[Path | None]:
    """A small disk of its own for a run; None, and a sentence, where it cannot be mounted."""
    disk = directory / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(disk)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(f"DiskFull is left out: a small disk could not be mounted: {done.stderr.strip()}", flush=True)
        yield None
        return
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def fill(disk: Path) -> None:
    """Write to a file on a disk until it has less than the room for a commit."""
    with (disk / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - (LEFT_MB << 20))


def over(prometheus: Prometheus, path: Path, name: str, what: str) -> None:
    """Wait until the way out of an alarm has helped: Prometheus no longer says it, and the run makes steps."""
    before = steps(path)
    seconds = wait(f"the way out of {name}", lambda: name not in prometheus.firing(), 300)
    wait(f"steps after {name}", lambda: steps(path) > before + 2, 300)
    print(f"{name} was over in Prometheus {seconds:.0f} s after {what}, and the run went on", flush=True)


def slow_rank(prometheus: Prometheus, run: RunDirectory) -> list[str]:
    """Stop the critic's rank for a while; what is wrong. Before a killed engine, which would explain a long phase."""
    (rank,) = [one.pid for one in stacks.labelled("rlhf/tiny/critic/0")][:1]
    try:
        wrong = fault(prometheus, run, "PhaseOverdue", lambda: os.kill(rank, signal.SIGSTOP))
    finally:
        os.kill(rank, signal.SIGCONT)
    over(prometheus, run.path, "PhaseOverdue", "the rank was continued")
    return wrong


def nan(prometheus: Prometheus, run: RunDirectory, poison: Path) -> list[str]:
    """Let one update meet NaN; what is wrong."""
    before = steps(run.path)
    wrong = fault(prometheus, run, "UpdatesSkipped", poison.touch)
    wait("steps after UpdatesSkipped", lambda: steps(run.path) > before + 2, 120)
    return wrong


def full_disk(prometheus: Prometheus, run: RunDirectory, disk: Path) -> list[str]:
    """Leave the disk of the run no room for a commit and free it again; what is wrong."""
    try:
        wrong = fault(prometheus, run, "DiskFull", lambda: fill(disk))
    finally:
        (disk / "filler").unlink(missing_ok=True)
    over(prometheus, run.path, "DiskFull", "the disk had room again")
    return wrong


def ppo(directory: Path, address: str, coverage: Coverage, disk: Path | None) -> list[str]:
    """The PPO run and its faults; what is wrong."""
    root = disk or directory
    prometheus, path = coverage.prometheus, root / "tiny"
    driver = start(
        directory, "ppo", "train", "ppo", str(ROOT / "tests/e2e/ppo_tiny.yaml"), "steps=4000", f"run.root={root}",
        f"cluster.address={address}", "rollout.backend=transformers", "policy.ranks=1", "policy.engine.zero=1",
        "checkpoint.every_steps=50", "evaluation={prompts: 4, every_steps: 50}", "run.deterministic=false",
        f"reward={{function: '{directory}/judge.py:lengths', hold_s: 300}}",
        f"algorithm.objective={directory}/objective.py:Clipped", "rollout.weight_delta=true", "run.stall_floor_s=90",
    )  # fmt: skip
    try:
        wait("three steps", lambda: steps(path) > 3, 600)
        run = RunDirectory.open(path)
        wait("metrics in Prometheus", lambda: bool(prometheus.query("ray_rlhf_step > 2")), 90)
        print("before:", {one.alarm.name for one in alarms(run)}, prometheus.firing(), flush=True)
        coverage.look()
        wrong = slow_rank(prometheus, run)
        wrong += nan(prometheus, run, directory / "poison")
        if disk is not None:
            wrong += full_disk(prometheus, run, disk)
        (engine,) = [one.pid for one in stacks.labelled("rlhf/tiny/rollout/1")][:1]
        wrong += fault(prometheus, run, "EngineLost", lambda: os.kill(engine, signal.SIGKILL))
        wrong += fault(prometheus, run, "RewardFailing", (directory / "away").touch)
        coverage.look()
        (directory / "away").unlink()
        seconds = wait("the way out", lambda: "RewardFailing" not in prometheus.firing(), 300)
        print(f"RewardFailing was over in Prometheus {seconds:.0f} s after the function was mended", flush=True)
        wrong += fault(prometheus, run, "RewardStalled", (directory / "stuck").touch)
        (directory / "stuck").unlink()
        coverage.look()
        return wrong
    finally:
        ended(driver)


def reward_model(directory: Path, address: str, coverage: Coverage) -> None:
    """The training of a reward model."""
    driver = start(
        directory, "rm", "train", "rm", "world-rm", f"run.root={directory}", f"cluster.address={address}", "run.name=rm",
        "reward.model.path=null", "reward.model.make={shape: llama-tiny, tokenizer_from: world, seed: 3}", "reward.ranks=1",
        "data.world={pairs: 4000, evaluation_pairs: 40}", "epochs=50", "evaluation.every_steps=20",
    )  # fmt: skip
    try:
        wait("twenty steps", lambda: steps(directory / "rm") > 20, 300)
        wait("metrics in Prometheus", lambda: bool(coverage.prometheus.query("ray_rlhf_loss_rm")), 90)
        time.sleep(20)
        coverage.look()
    finally:
        ended(driver)


def killed(service: subprocess.Popen[bytes], prometheus: Prometheus) -> list[str]:
    """Kill the service; what is wrong about what Prometheus said of it."""
    service.kill()
    try:
        seconds = wait("ServiceDown", lambda: "ServiceDown" in prometheus.firing(), DOWN_S + LIMIT_S)
    except TimeoutError as error:
        return [f"{error}; Prometheus said {prometheus.firing()}"]
    print(
        f"| ServiceDown | Prometheus after {seconds:.1f} s, which waits {DOWN_S:g} s | {prometheus.firing()} |",
        flush=True,
    )
    return []


def show(coverage: Coverage) -> list[str]:
    """Print which expressions had no data; those that should have had."""
    missing, every = coverage.missing(), {text for _, text in expressions()}
    print(
        f"{len(every) - len(missing)} of {len(every)} expressions of panels and rules had data; the others:", flush=True
    )
    wrong = []
    for text, places in missing.items():
        reason = appears(text)
        print(f"| {text} | {', '.join(dict.fromkeys(places))} | {reason or 'NOTHING SAYS WHY'} |", flush=True)
        if reason is None:
            wrong.append(f"no data: {text} ({places[0]})")
    return wrong


def main() -> int:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prometheus", default=shutil.which("prometheus"), help="the program; Debian's package has it")
    parser.add_argument("--draw", type=Path, help="a directory for a picture of each dashboard")
    arguments = parser.parse_args()
    if arguments.prometheus is None:
        parser.error("prometheus is not installed: apt-get install prometheus, or name the program with --prometheus")
    wrong: list[str] = []
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        (directory / "judge.py").write_text(JUDGE)
        (directory / "objective.py").write_text(OBJECTIVE)
        address, page = stack.enter_context(cluster())
        port = network.free_port("127.0.0.1")
        prometheus = Prometheus(arguments.prometheus, page, directory, [f"127.0.0.1:{port}"])
        stack.callback(prometheus.close)
        coverage, began = Coverage(prometheus), time.time()
        try:
            model = save_reward_model(directory / "model")
            service = start(directory, "serve", "serve", str(model), f"port={port}", "reward.resources.cpus_per_rank=0.2",
                            f"cluster.address={address}", f"run.root={directory}")  # fmt: skip
            stack.callback(ended, service)
            load = Load(f"http://127.0.0.1:{port}")
            load.start()
            stack.callback(load.stop)
            wrong += ppo(directory, address, coverage, stack.enter_context(small_disk(directory)))
            wait("a service that answers", lambda: bool(prometheus.query("rlhf_scoring_forwards_total > 10")), 120)
            reward_model(directory, address, coverage)
            load.stop()
            wrong += killed(service, prometheus)
            coverage.look()
            wrong += show(coverage)
        except (TimeoutError, ValueError) as error:
            logs = "".join(f"{path.name}\n{path.read_text()[-3000:]}" for path in directory.glob("*.log"))
            wrong.append(f"{error}\n{logs}")
        for board in BOARDS if arguments.draw is not None else ():
            arguments.draw.mkdir(parents=True, exist_ok=True)
            (arguments.draw / f"{board.name}.svg").write_text(draw(board, prometheus, began, time.time()))
    for one in wrong:
        print("WRONG:", one)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
