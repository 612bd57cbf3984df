"""``rlhf-ray doctor``."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_arguments(commands: Any) -> None:
    """Add this verb."""
    command = commands.add_parser("doctor", help="what this machine can run, and what is missing")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Print a table; the exit code says whether jobs can run."""
    from rlhf_ray.launch.doctor import examine, exit_code, report

    findings = examine()
    sys.stdout.write(f"{report(findings)}\n")
    return exit_code(findings)
