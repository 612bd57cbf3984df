"""``python -m tests.gpu.run [--device cpu] [--only CHECK ...] [--results FILE]``: check and measure what needs a GPU.

Always true: each check says what it needs, is run where all of it is there, and is listed with the reason where it is
not. Each runs in a process of its own with a time limit, so that one that fails, hangs or crashes costs no other its
run. The whole ends within ``--minutes``, and lists what it had no time for. Every figure is in the file of results, and
every line in the log beside it, as soon as it is known. The exit code is 1 if a check failed. A machine without a GPU
leaves out everything and succeeds. This module needs nothing but Python.

What a bare machine lacks is carried there in wheels (``python -m tests.gpu.prepare``) and installed into a folder that
is gone afterwards; nothing of the machine's own Python changes.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.context import BaseContext
from pathlib import Path

from rlhf_ray import environment
from rlhf_ray.environment import Device
from tests.gpu import carried
from tests.gpu.checks import CHECKS, Check
from tests.gpu.needs import missing
from tests.gpu.perform import FAILED, perform, say

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu.json"
MINUTES = 9.0
"""A machine that is lent runs a command for ten minutes at most."""
START = {"cuda": "spawn", "cpu": "forkserver"}
"""How processes start on a device: what a process knows of a GPU does not survive a fork, so there each starts anew."""
PRELOADED = ["tests.gpu.agreement", "tests.gpu.engines", "peft", "bitsandbytes", "torch._inductor.compile_fx"]
"""What the server of forked processes imports once for all of them."""
OFFLINE = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run what can be run; returns the exit code."""
    options = _parser().parse_args(arguments)
    environment.prepare(OFFLINE)
    ends = time.monotonic() + 60 * options.minutes
    chosen = [check for check in CHECKS if not options.only or check.name in options.only]
    context = _context(options.start or START[options.device])
    with tempfile.TemporaryDirectory(prefix="rlhf_ray-gpu-") as folder:
        if carried.prepared(options.wheels):
            say(f"installed {carried.install(options.wheels, Path(folder))}", options.results)
        if options.patience != 1:
            chosen = [replace(check, limit_s=options.patience * check.limit_s) for check in chosen]
        endings = [_run(check, options.device, options.results, ends, context) for check in chosen]
    counts = {ending: endings.count(ending) for ending in ("passed", "failed", "left out")}
    say(", ".join(f"{count} {ending}" for ending, count in counts.items()), options.results)
    return FAILED if counts["failed"] else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tests.gpu.run", description="check and measure what needs a GPU")
    names = [check.name for check in CHECKS]
    parser.add_argument(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu rehearses the same checks with tiny sizes (default: cuda)",
    )
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="CHECK", help=f"some of {', '.join(names)} (default: all)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="file for the figures; the log lies beside it")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"when to end (default: {MINUTES:g})")
    parser.add_argument(
        "--patience", type=float, default=1.0, help="how many times its limit a check may take (default: 1)"
    )
    parser.add_argument(
        "--wheels", type=Path, default=carried.FOLDER, help="folder that tests.gpu.prepare made; may be missing"
    )
    parser.add_argument(
        "--start",
        choices=("spawn", "forkserver"),
        help="how the process of a check starts (default: spawn on cuda, and on cpu forkserver, which imports once)",
    )
    return parser


def _context(method: str) -> BaseContext:
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload(PRELOADED)
    return context


def _run(check: Check, device: Device, results: Path, ends: float, context: BaseContext) -> str:
    """Run a check if all that it needs is there, in a process of its own; says and returns how that ended."""
    left = ends - time.monotonic()
    reasons = missing(check.needs, device) or ["there was no time left"] * (left <= 0)
    if reasons:
        say(f"left out  {check.name}: {', '.join(reasons)}", results)
        return "left out"
    began, limit = time.monotonic(), min(check.limit_s, left)
    process = context.Process(target=perform, args=(check, device, results, limit))  # type: ignore[attr-defined]
    process.start()
    try:
        process.join(limit)
        in_time = not process.is_alive()
    finally:
        for kill in (os.killpg, os.kill):  # what it started too; before it has a group of its own, it alone
            with suppress(ProcessLookupError):
                kill(process.pid, signal.SIGKILL)
        process.join()
    took = time.monotonic() - began
    if not in_time and limit < check.limit_s:
        say(f"left out  {check.name}: the time was over after its first {took:.0f} s", results)
        return "left out"
    if not in_time:
        say(f"failed    {check.name}: it had not ended after {took:.0f} s", results)
    elif process.exitcode not in (0, FAILED):
        say(f"failed    {check.name}: its process ended with {process.exitcode} after {took:.0f} s", results)
    say(f"          {took:.0f} s", results)
    return "passed" if in_time and process.exitcode == 0 else "failed"


if __name__ == "__main__":
    sys.exit(main())
