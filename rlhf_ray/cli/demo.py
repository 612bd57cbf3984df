"""The command ``rlhf-ray demo``: fine-tuning, a reward model and PPO on this machine, with a report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.cli.examples import examples

JOBS = ("sft", "rm", "ppo")
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
    """Check the settings of all three jobs, then run them one after the other in one Ray session."""
    from rlhf_ray.launch.parent import start_demo

    check(options.overrides)
    check_root(Path(options.root))
    return start_demo(options.root, options.seed, options.overrides)


def check_root(root: Path) -> None:
    """Refuse a place that the runs and the report cannot be written to, before anything starts."""
    from rlhf_ray import storage
    from rlhf_ray.runs.directory import RunDirectory

    root = root.absolute()
    with storage.storage_errors(root):
        made = storage.make_directories(root)
    try:
        storage.OutputFile(
            root / "report.html", "demo --root", way_out="move it away, or choose another --root"
        ).check()
        for job in JOBS:
            RunDirectory.create(root / job, "").discard()
    finally:
        storage.remove_empty(made)


def check(overrides: Sequence[str]) -> None:
    """Refuse settings that name no job of the demo, and those that are wrong for their job, before anything starts."""
    from rlhf_ray.config.loading import load_config
    from rlhf_ray.errors import ConfigError, RequestError

    for override in overrides:
        if override.lstrip("-").partition(".")[0] not in JOBS:
            raise RequestError(
                f"{override}: a setting of the demo begins with the job that it is for, {', '.join(JOBS[:-1])} or {JOBS[-1]}, "
                "such as ppo.steps=10"
            )
    problems = []
    for job in JOBS:
        own = [override.removeprefix(f"{job}.") for override in overrides if override.startswith(f"{job}.")]
        try:
            config: Any = load_config(f"demo-{job}", own)
            if job == "rm" and config.data.world is None:
                problems.append("rm.data.world: null, but the demo compares models on the pairs of the generated world")
        except ConfigError as error:
            problems += [f"{job}.{problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems, "demo")
