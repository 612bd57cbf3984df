"""What a tracker whose server is sick costs a run: refuses, never answers, dies in the middle, raises, or has no disk.

Usage: python -m tests.trackers.sick_servers [--seconds 30] [--only NAME]. It prints a table and ends with 1 where a case costs
1 % of the run's time, or a step. The run logs a step each tenth of a second and commits every tenth; the time that trackers
take of it is measured around all that a run calls of them.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil

from rlhf_ray.config.sections.run import MonitoringConfig
from rlhf_ray.trackers.starting import Followed
from rlhf_ray.trackers.state import states
from tests.trackers.small_run import SmallRun

MOST = 0.01


@contextmanager
def refusing() -> Iterator[str]:
    """A port that nobody listens on."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"http://127.0.0.1:{taken.getsockname()[1]}"


@contextmanager
def silent() -> Iterator[str]:
    """Takes connections and never answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def failing() -> Iterator[str]:
    """Answers everything with an error of its own."""

    class Failing(BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.send_response(500)
            self.end_headers()
            self.wfile.write(b"{}")

        do_GET = do_POST = answer

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@contextmanager
def nothing() -> Iterator[str]:
    yield ""


def kill_of(name: str) -> Callable[[SmallRun], None]:
    """Kills a process of a tracker in the middle of the run."""

    def kill(small: SmallRun) -> None:
        for process in psutil.process_iter(["name", "cmdline"]):
            words = " ".join(process.info["cmdline"] or ())
            if name in words and str(small.run.path) in words + " ".join(ancestry(process)):
                process.kill()

    return kill


def ancestry(process: psutil.Process) -> list[str]:
    try:
        return [word for parent in process.parents() for word in parent.cmdline()]
    except psutil.Error:
        return []


def lose_disk(small: SmallRun) -> None:
    """A file in the place of the directory that the tracker writes to."""
    place = small.run.path / "tensorboard"
    if place.is_dir():
        place.rename(place.with_name("lost"))
    place.write_text("")


@dataclass(frozen=True)
class Case:
    """A tracker, its server, and what happens to it in the middle."""

    tracker: str
    server: Callable[[], object] = nothing
    middle: Callable[[SmallRun], None] = lambda small: None
    variables: Mapping[str, str] = field(default_factory=dict)


WANDB = {"WANDB_BASE_URL": "{url}", "WANDB_API_KEY": "0123456789" * 4}
CASES = {
    "nothing is wrong (jsonl)": Case("jsonl:{root}/lines"),
    "tensorboard, its directory becomes a file": Case("tensorboard", middle=lose_disk),
    "wandb, refuses": Case("wandb", refusing, variables=WANDB),
    "wandb, never answers": Case("wandb", silent, variables=WANDB),
    "wandb, fails": Case("wandb", failing, variables=WANDB),
    "wandb offline, its own process dies": Case("wandb:offline", middle=kill_of("wandb-core")),
    "mlflow, refuses": Case("mlflow:{url}", refusing),
    "mlflow, never answers": Case("mlflow:{url}", silent),
    "mlflow, fails": Case("mlflow:{url}", failing),
    "mlflow on sqlite, its process dies": Case("mlflow", middle=kill_of("rlhf_ray.trackers.feeding")),
    "trackio, its process dies": Case("trackio:{root}/trackio", middle=kill_of("rlhf_ray.trackers.feeding")),
    "trackio, its place is a file": Case("trackio:/dev/null"),
    "jsonl, on a full disk": Case("jsonl:/dev/full"),
}


def measure(case: Case, seconds: float) -> tuple[float, int, int, str]:
    """The share of the run's time, the steps that it was to log and that it has, and what the tracker says."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, case.server() as url:  # type: ignore[attr-defined]
        root = Path(folder)
        os.environ.update({name: value.format(url=url) for name, value in case.variables.items()})
        small = SmallRun(root)
        tracker = case.tracker.format(url=url, root=root)
        began = time.monotonic()
        followed = Followed(small.run, MonitoringConfig(trackers=[tracker]))
        took = time.monotonic() - began
        step = 0
        while time.monotonic() - began < seconds:
            step += 1
            small.log(step)
            if step % 10 == 0:
                small.commit(step)
            if step == int(5 * seconds):
                case.middle(small)
            time.sleep(0.1)
        small.finish()
        closing = time.monotonic()
        followed.close()
        ended = time.monotonic()
        has = len(small.run.metrics.read())
        process = followed._process
        assert process is not None
        limit = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < limit:
            time.sleep(0.2)
        said = "; ".join(state.describe() for state in states(small.run.path)) or "nothing is sent yet"
        log = root / "small/trackers/follower.log"
        said += "" if not log.exists() or process.poll() is not None else " (still at it after a minute)"
        for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
            child.kill()
        process.kill()
        process.wait(10)
        return (took + ended - closing) / (ended - began), step, has, said


def main() -> int:
    """Measure all cases; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    before, worst = dict(os.environ), 0.0
    print("| case | share of the run's time | steps logged of | what the tracker has |\n|---|---|---|---|")
    lost = 0
    for name, case in CASES.items():
        if options.only in name:
            os.environ.clear()
            os.environ.update(before)
            share, steps, has, said = measure(case, options.seconds)
            worst, lost = max(worst, share), lost + steps - has
            print(f"| {name} | {share:.3%} | {has} of {steps} | {said[:160]} |", flush=True)
    return int(worst >= MOST or lost > 0)


if __name__ == "__main__":
    sys.exit(main())
