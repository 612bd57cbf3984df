"""The process that a user starts: it runs the driver in a process of its own and starts it again when it fails.

Invariants: it loads neither torch nor ray; signals reach the driver, and the exit code of the driver reaches the caller. A
driver that died or failed is started again from the last commit, as often as the config allows, unless it was asked to
stop. A job that this machine cannot hold is refused before any driver starts.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rlhf_ray import environment
from rlhf_ray.config.jobs.base import Job
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.config.paths import run_directory, with_absolute_paths
from rlhf_ray.config.recipes import CONFIG_NAME
from rlhf_ray.console import get_logger
from rlhf_ray.errors import EXIT_DONE, EXIT_FAILED, EXIT_NO_CAPACITY, EXIT_RESUMABLE, EXIT_WRONG_REQUEST, RequestError
from rlhf_ray.planning.capacity import needed, offered_here, require_fit
from rlhf_ray.runs.directory import RunDirectory

FINAL_CODES = {EXIT_DONE, EXIT_WRONG_REQUEST, EXIT_NO_CAPACITY, EXIT_RESUMABLE}
FORWARDED = (signal.SIGTERM, signal.SIGINT)
DRIVER = "rlhf_ray.launch.driver"
DEMO = "rlhf_ray.launch.demo"


@dataclass(frozen=True)
class Ending:
    """How a driver ended: its exit code (negative for a signal), and whether it had been asked to stop."""

    code: int
    stop_requested: bool = False

    @property
    def is_final(self) -> bool:
        """Whether another start would change nothing, or is not wanted."""
        return self.stop_requested or self.code in FINAL_CODES

    def exit_code(self, directory: Path) -> int:
        """The exit code for the caller: a driver that was killed by the request to stop can be resumed from its last commit."""
        if self.code in FINAL_CODES:
            return self.code
        resumable = self.stop_requested and self.code < 0 and (directory / CONFIG_NAME).is_file()
        return EXIT_RESUMABLE if resumable else EXIT_FAILED


def start_run(config: Job, *, driver: str = DRIVER) -> int:
    """Run a driver for a new run; returns the exit code."""
    config = with_absolute_paths(config, Path.cwd())  # ranks on a running cluster have other working directories
    _require_room(config)
    text = dump_config(config)
    return _restart_until_final(
        run_driver(driver, [], text), run_directory(config), config.run.max_restarts, driver, text
    )


def resume_run(directory: str | Path, *, driver: str = DRIVER) -> int:
    """Run a driver that resumes the run in ``directory`` from its last commit; returns the exit code.

    A finished run without a checkpoint is refused: it would be trained again from the start, over its final model.
    """
    run = RunDirectory.open(directory)
    if run.summary_path.is_file() and not run.checkpoints.steps():
        raise RequestError(
            f"the run {run.path} has finished and has no checkpoint to go on from: to train it again, choose another "
            "run.name, or remove the directory"
        )
    directory = run.path.absolute()
    config = load_config(directory / CONFIG_NAME)
    _require_room(config)
    return _restart_until_final(
        _run_resuming_driver(driver, directory), directory, config.run.max_restarts, driver, dump_config(config)
    )


def start_demo(root: str, seed: int, overrides: Sequence[str]) -> int:
    """Run the demo's three jobs in one driver."""
    root = str(Path(root).absolute())
    return run_driver(DEMO, ["--root", root, "--seed", str(seed), *overrides]).exit_code(Path(root))


def _require_room(config: Job) -> None:
    """Refuse a job that this machine cannot hold if Ray starts here; the driver asks a running cluster itself."""
    offered = offered_here(config.cluster)
    if offered is not None:
        require_fit(needed(config), offered)


def _restart_until_final(ending: Ending, directory: Path, restarts: int, driver: str, text: str) -> int:
    """Start another driver as long as the last one failed: from the last commit, or anew where no run was begun."""
    for attempt in range(1, restarts + 1):
        if ending.is_final:
            break
        get_logger().warning("the driver ended with %d: restart %d of %d", ending.code, attempt, restarts)
        begun = (directory / CONFIG_NAME).is_file()
        ending = _run_resuming_driver(driver, directory) if begun else run_driver(driver, [], text)
    return ending.exit_code(directory)


def _run_resuming_driver(driver: str, directory: Path) -> Ending:
    return run_driver(driver, ["--resume", str(directory)])


def run_driver(module: str, arguments: Sequence[str], text: str = "") -> Ending:
    """Run one driver from start to end; ``text`` is its standard input. Signals to this process are passed on to it."""
    command = [sys.executable, "-m", module, *arguments]
    received: list[int] = []
    running: list[subprocess.Popen[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for driver in running:
            driver.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        variables = {**environment.for_process(), **os.environ}
        driver = subprocess.Popen(command, stdin=subprocess.PIPE, env=variables)
        running.append(driver)
        if received:  # before the driver existed
            driver.send_signal(received[-1])
        driver.communicate(text.encode())
        return Ending(driver.returncode, bool(received))
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
