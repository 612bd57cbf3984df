"""One check in a process of its own, which its parent may kill.

Always true: what a check measured is in the file of figures, and what it said in the log beside it, before the process
ends.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import traceback
from pathlib import Path

from benchmarks.figures import record, table
from rlhf_ray.environment import Device
from tests.gpu.checks import Check, FoundWrong
from tests.gpu.sizes import SIZES

FAILED = 1
SECONDS_BEFORE_THE_END = 3.0
"""How long before a check is killed it says where it stands."""


def perform(check: Check, device: Device, results: Path, limit_s: float) -> None:
    """Run a check, and end this process with 1 if it failed."""
    os.setsid()  # so that what it starts can be killed with it
    faulthandler.dump_traceback_later(max(limit_s - SECONDS_BEFORE_THE_END, 1.0), file=sys.stderr)
    passed = run_here(check, device, results)
    sys.exit(0 if passed else FAILED)


def run_here(check: Check, device: Device, results: Path) -> bool:
    """Run a check in this process; returns whether it passed."""
    try:
        findings = check.run(device, SIZES[device])
    except Exception as error:
        if isinstance(error, FoundWrong):
            record(error.figures, results)
        say(f"failed    {check.name}\n{traceback.format_exc()}", results)
        return False
    if isinstance(findings, tuple):
        figures, text = findings
    else:
        figures, text = ({}, findings) if isinstance(findings, str) else (findings, "")
    if figures:
        record(figures, results)
    say("\n".join(filter(None, [f"passed    {check.name}: {text}", table(figures)])), results)
    return True


def say(line: str, results: Path) -> None:
    """Print a line and append it to the log beside the file of figures."""
    print(line, flush=True)
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.with_suffix(".log").open("a") as log:
        log.write(line + "\n")
