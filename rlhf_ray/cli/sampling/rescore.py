"""The command ``rlhf-ray rescore``: what another reward makes of the samples of a run, or of answers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlhf_ray.cli.examples import examples

EXAMPLES = (
    "rescore runs/demo-ppo --reward OTHER_REWARD_MODEL",
    "rescore best.answers.jsonl --reward http://HOST:5000 --output rescored.jsonl",
)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "rescore", help="score a run's samples with another reward, and what would have changed", **examples(*EXAMPLES)
    )
    command.add_argument("samples", metavar="RUN_DIR", help="a PPO run, or a file in which generate kept its answers")
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="of the recipe serve for a reward model, or of reward, such as reward.timeout_s=10",
    )
    command.add_argument(
        "--reward", required=True, metavar="MODEL|URL|FUNCTION", help="a reward model, a scoring service, or a function"
    )
    command.add_argument("--output", type=Path, help="a .jsonl file for every sample with both rewards")
    command.add_argument("--overwrite", action="store_true", help="let it take the place of the file at --output")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Read the samples, score them, and print what changes."""
    from rlhf_ray.launch.parent import with_own_ray
    from rlhf_ray.launch.sampling.request import other_reward
    from rlhf_ray.storage import OutputFile

    output = None
    if options.output is not None:
        output = OutputFile(options.output, overwrite=options.overwrite, reads=[Path(options.samples)], ending=".jsonl")
    if output is not None:
        output.check()
    reward = other_reward(options.reward, options.overrides)

    def work() -> int:
        from rlhf_ray.launch.sampling.request import rescore_samples
        from rlhf_ray.launch.sampling.rescore import print_report, write_rescored

        report = rescore_samples(options.samples, reward)
        print_report(report)
        if output is not None:
            write_rescored(report, output)
        return 0

    from rlhf_ray.config.jobs.base import Job

    return with_own_ray(reward, options.arguments, work) if isinstance(reward, Job) else work()
