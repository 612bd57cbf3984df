"""The command ``rlhf-ray status``: say how far a run is, and how to go on with it."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rlhf_ray.cli.examples import examples
from rlhf_ray.console import printable, write_result

EXAMPLES = ("status runs/demo-ppo", "status runs/demo-ppo --follow")


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser("status", help="how far a run is, and how to go on with it", **examples(*EXAMPLES))
    command.add_argument("run_directory")
    command.add_argument(
        "--follow",
        action="store_true",
        help="show it again and again until the run has finished: a picture on a terminal, else lines for what is new, "
        "which also end when nobody has gone on with the run for two minutes",
    )
    command.add_argument("--json", action="store_true", help="one JSON object, with the alarms that hold, for programs")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what the files of a run tell, on standard output."""
    from rlhf_ray.runs.directory import RunDirectory
    from rlhf_ray.runs.reporting import alarms, status
    from rlhf_ray.trackers.state import states

    opened = RunDirectory.open(options.run_directory)
    if options.follow:
        from rlhf_ray.cli.runs.following import follow

        return follow(opened)
    trackers = {f"tracker {state.tracker}": state.describe() for state in states(opened.path)}
    lines = {**status(opened), **trackers}
    if options.json:
        held = [one.plain() for one in alarms(opened)]
        write_result(json.dumps({"status": lines, "alarms": held}) + "\n")
        return 0
    width = max(map(len, lines))
    write_result("".join(f"{name:<{width}}  {printable(value)}\n" for name, value in lines.items()))
    return 0
