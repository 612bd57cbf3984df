"""The command ``rlhf-ray resume``: go on with a run from its last commit."""

from __future__ import annotations

import argparse
from typing import Any

from rlhf_ray.cli.examples import examples

EXAMPLES = ("resume runs/demo-ppo",)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser("resume", help="go on with a run from its last commit", **examples(*EXAMPLES))
    command.add_argument("run_directory")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Continue with the resolved config of the run directory."""
    from rlhf_ray.launch.parent import resume_run

    return resume_run(options.run_directory)
