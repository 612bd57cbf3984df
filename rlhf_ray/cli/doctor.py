"""The command ``rlhf-ray doctor``: say what this machine can run, and what is missing."""

from __future__ import annotations

import argparse
from typing import Any

from rlhf_ray.cli.examples import examples
from rlhf_ray.console import write_result

EXAMPLES = ("doctor",)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "doctor", help="what this machine can run, and what is missing", **examples(*EXAMPLES)
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print a table; the exit code says whether jobs can run."""
    from rlhf_ray.launch.doctor import examine, exit_code, report

    findings = examine()
    write_result(f"{report(findings)}\n")
    return exit_code(findings)
