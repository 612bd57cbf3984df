"""The command ``rlhf-ray resume``: go on with a run from its last commit."""

from __future__ import annotations

import argparse
from typing import Any

from rlhf_ray.cli.examples import examples

EXAMPLES = (
    "resume runs/demo-ppo",
    "resume runs/demo-ppo steps=80 policy.engine.optimizer.learning_rate=1e-3",
    "resume runs/demo-ppo --accept data.path",
)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser("resume", help="go on with a run from its last commit", **examples(*EXAMPLES))
    command.add_argument("run_directory")
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="what the rest of the run changes"
    )
    command.add_argument("--accept", action="append", default=[], metavar="KEY", help="go on although what lies at this key, "
                         "such as data.path, has changed since the run began; may be given several times")  # fmt: skip
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Continue with the resolved config of the run directory, and with the changes that are asked for."""
    from rlhf_ray.launch.parent import resume_run

    return resume_run(options.run_directory, options.overrides, options.accept)
