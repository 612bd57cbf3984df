"""``rlhf-ray report RUN_DIR [RUN_DIR ...]``."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_arguments(commands: Any) -> None:
    """Add this verb."""
    command = commands.add_parser("report", help="write the report of a run, or of several side by side")
    command.add_argument("run_directories", nargs="+", metavar="RUN_DIR")
    command.add_argument("--output", help="the file to write (default: report.html in the first run directory)")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Write a self-contained HTML file and print where it lies."""
    from rlhf_ray.runs.directory import RunDirectory
    from rlhf_ray.runs.reporting import write_report

    runs = [RunDirectory.open(directory) for directory in given.run_directories]
    sys.stdout.write(f"{write_report(runs, given.output)}\n")
    return 0
