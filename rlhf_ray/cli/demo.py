"""The command ``rlhf-ray demo``: fine-tuning, a reward model and PPO on this machine, with a report."""

from __future__ import annotations

import argparse
from typing import Any

from rlhf_ray.cli.examples import examples

EXAMPLES = (
    "demo --seed 1",
    "demo ppo.steps=10 --root runs/short",
)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "demo",
        help="SFT, a reward model and PPO on this machine's CPU, with a report",
        **examples(*EXAMPLES),
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--root", default="runs/demo", help="where the three runs and the report go")
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="sft|rm|ppo.key=value", help="such as ppo.steps=10"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the three jobs one after the other in one Ray session."""
    from rlhf_ray.launch.parent import start_demo

    return start_demo(options.root, options.seed, options.overrides)
