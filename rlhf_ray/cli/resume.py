"""``rlhf-ray resume RUN_DIR``."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(commands: Any) -> None:
    """Add this verb."""
    command = commands.add_parser("resume", help="go on with a run from its last commit")
    command.add_argument("run_directory")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Continue with the resolved config of the run directory."""
    from rlhf_ray.launch.parent import resume_run

    return resume_run(given.run_directory)
