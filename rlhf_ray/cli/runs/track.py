"""The command ``rlhf-ray track``: send what is on record of a run to trackers, also of one that is under way."""

from __future__ import annotations

import argparse
from typing import Any

from rlhf_ray.cli.examples import examples

EXAMPLES = (
    "track runs/demo-ppo",
    "track runs/demo-ppo --to wandb:offline --to mlflow:http://127.0.0.1:5000",
)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "track", help="send what trackers lack of a run; of one that is under way, until it ends", **examples(*EXAMPLES)
    )
    command.add_argument("run_directory")
    command.add_argument("--to", action="append", default=[], metavar="TRACKER", help="NAME or NAME:PLACE, as in "
                         "monitoring.trackers (default: those of the run's config); may be given several times")  # fmt: skip
    command.add_argument("--project", help="the project, or experiment (default: monitoring.project of the run)")
    command.add_argument(
        "--live", action="store_true", help="each attempt as a curve of its own, with uncommitted steps"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Feed the trackers until they have everything; 1 where one of them lacks steps."""
    from rlhf_ray.trackers.catching_up import track

    return track(options.run_directory, options.to, project=options.project, live=options.live)
