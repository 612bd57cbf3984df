"""Checks that end in every way, for the tests of what runs them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.figures import Figure, Figures
from rlhf_ray.environment import Device
from tests.gpu.sizes import Sizes


def pass_with_figure(device: Device, sizes: Sizes) -> tuple[Figures, str]:
    return {f"on {device}": Figure(sizes.repeats, "repeats", True, "counted")}, "counted"


def fail(device: Device, sizes: Sizes) -> str:
    raise AssertionError("off by one")


def crash(device: Device, sizes: Sizes) -> str:
    os.kill(os.getpid(), signal.SIGSEGV)
    return "never"


def hang_with_a_child(device: Device, sizes: Sizes, *, pid_file: str) -> str:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(pid_file).write_text(str(child.pid))
    time.sleep(600)
    return "never"
