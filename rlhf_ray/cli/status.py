"""``rlhf-ray status RUN_DIR``."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_arguments(commands: Any) -> None:
    """Add this verb."""
    command = commands.add_parser("status", help="how far a run is, and how to go on with it")
    command.add_argument("run_directory")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Print what the files of a run tell, on standard output."""
    from rlhf_ray.runs.directory import RunDirectory
    from rlhf_ray.runs.reporting import status

    lines = status(RunDirectory.open(given.run_directory))
    width = max(map(len, lines))
    sys.stdout.write("".join(f"{name:<{width}}  {value}\n" for name, value in lines.items()))
    return 0
