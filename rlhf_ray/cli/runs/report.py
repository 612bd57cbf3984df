"""The command ``rlhf-ray report``: write the HTML report of one run or of several."""

from __future__ import annotations

import argparse
from typing import Any

from rlhf_ray.cli.examples import examples
from rlhf_ray.console import printable, write_result

EXAMPLES = (
    "report runs/demo-ppo",
    "report runs/first runs/second --output both.html",
)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "report",
        help="write the report of a run, or of several side by side",
        **examples(*EXAMPLES),
    )
    command.add_argument("run_directories", nargs="+", metavar="RUN_DIR")
    command.add_argument("--output", help="the file to write (default: report.html in the first run directory)")
    command.add_argument("--overwrite", action="store_true", help="let --output take the place of a file of yours")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write a self-contained HTML file and print where it lies."""
    from rlhf_ray.runs.directory import RunDirectory
    from rlhf_ray.runs.reporting import write_report

    runs = [RunDirectory.open(directory) for directory in options.run_directories]
    path = write_report(runs, options.output, overwrite=options.overwrite)
    write_result(f"{printable(str(path))}\n")
    return 0
