"""``rlhf-ray demo [--seed N]``."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(commands: Any) -> None:
    """Add this verb."""
    command = commands.add_parser("demo", help="SFT, a reward model and PPO on this machine's CPU, with a report")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--root", default="runs/demo", help="where the three runs and the report go")
    command.add_argument("overrides", nargs="*", metavar="sft|rm|ppo.key=value", help="such as ppo.steps=10")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Run the three jobs one after the other in one Ray session."""
    from rlhf_ray.launch.parent import start_demo

    return start_demo(given.root, given.seed, given.overrides)
