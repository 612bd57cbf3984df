"""The command ``rlhf-ray samples``: show what a PPO run sampled, answers side by side, or one of them token by token."""

from __future__ import annotations

import argparse
from typing import Any

from rlhf_ray.cli.examples import examples
from rlhf_ray.console import write_result

EXAMPLES = (
    "samples runs/demo-ppo",
    "samples runs/demo-ppo --step 20 --tokens 1",
    "samples runs/demo-ppo --compare",
)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "samples", help="what a PPO run sampled, side by side or token by token", **examples(*EXAMPLES)
    )
    command.add_argument("run_directory")
    command.add_argument("--step", type=int, help="of which step (default: the last that has samples)")
    command.add_argument(
        "--tokens", type=int, metavar="N", help="sample N token by token: log-probs, values, rewards and advantages"
    )
    command.add_argument(
        "--compare", action="store_true", help="held-out answers of the starting policy and of the trained one"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print samples on standard output."""
    from rich.console import Console

    from rlhf_ray.cli.runs.following import pen_of
    from rlhf_ray.errors import RequestError
    from rlhf_ray.monitoring.terminal.drawing import short
    from rlhf_ray.monitoring.terminal.samples import compared_view, samples_view, token_view
    from rlhf_ray.runs.directory import RunDirectory

    opened, pen = RunDirectory.open(options.run_directory), pen_of(Console(highlight=False))
    if options.compare:
        samples = opened.summary().samples
        if not samples:
            raise RequestError(
                f"{opened.path} has no answers to compare: it has not finished, or has no held-out prompts"
            )
        views = []
        for sample in samples:
            answers = [
                (", ".join([one.label, *(f"{name} {short(value)}" for name, value in one.scores.items())]), one.text)
                for one in sample.answers
            ]
            views.append("\n".join(compared_view(sample.prompt, answers, pen)))
        write_result("\n\n".join(views) + "\n")
        return 0
    step, rows = opened.read_samples(options.step)
    if options.tokens is None:
        lines = [f"step {step}", *samples_view(rows, pen)]
    elif 1 <= options.tokens <= len(rows):
        lines = token_view(rows[options.tokens - 1], pen)
    else:
        raise RequestError(f"step {step} of {opened.path} has {len(rows)} samples: there is no number {options.tokens}")
    write_result("\n".join(lines) + "\n")
    return 0
