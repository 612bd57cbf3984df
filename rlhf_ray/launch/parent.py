"""The process a user starts: it is no Ray client, it owns the driver's life.

Always true: it loads neither torch nor ray; signals reach the driver and the driver's exit code reaches the caller; a
driver that died without an exit code of its own is started again from the last commit, as often as the config allows.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rlhf_ray import environment
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.config.schema import JobConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import EXIT_DONE, EXIT_FAILED, EXIT_NO_CAPACITY, EXIT_RESUMABLE, EXIT_WRONG_REQUEST

FINAL_CODES = {EXIT_DONE, EXIT_WRONG_REQUEST, EXIT_NO_CAPACITY, EXIT_RESUMABLE}
FORWARDED = (signal.SIGTERM, signal.SIGINT)
DRIVER = "rlhf_ray.launch.driver"
DEMO = "rlhf_ray.launch.demo"


def start_run(config: JobConfig) -> int:
    """Run a driver for a new run; returns the exit code."""
    code = drive(DRIVER, [], text=dump_config(config))
    run = str(Path(config.run.root) / config.run.name)
    return _restart(run, code, config.run.max_restarts)


def resume_run(directory: str | Path) -> int:
    """Go on with the run in ``directory`` from its last commit."""
    config = load_config(Path(directory) / "config.yaml")
    code = drive(DRIVER, ["--resume", str(directory)])
    return _restart(str(directory), code, config.run.max_restarts)


def start_demo(root: str, seed: int, overrides: Sequence[str]) -> int:
    """Run the demo's three jobs in one driver."""
    code = drive(DEMO, ["--root", root, "--seed", str(seed), *overrides])
    return code if code in FINAL_CODES else EXIT_FAILED


def _restart(run: str, code: int, restarts: int) -> int:
    """While the last driver died without a code of its own, start another from the last commit."""
    for attempt in range(1, restarts + 1):
        if code in FINAL_CODES:
            break
        get_logger().warning(
            "the driver died (code %d): restart %d of %d from the last commit", code, attempt, restarts
        )
        code = drive(DRIVER, ["--resume", run])
    return code if code in FINAL_CODES else EXIT_FAILED


def drive(module: str, arguments: Sequence[str], text: str = "") -> int:
    """One driver, from start to end; its exit code, negative for a signal."""
    command = [sys.executable, "-m", module, *arguments]
    driver = subprocess.Popen(command, stdin=subprocess.PIPE, env={**environment.for_process(), **os.environ})

    def forward(number: int, frame: FrameType | None) -> None:
        driver.send_signal(number)

    previous = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        driver.communicate(text.encode())
        return driver.returncode
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
