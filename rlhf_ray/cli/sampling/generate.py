"""The command ``rlhf-ray generate``: answers to a file of prompts, scored, and the rows that are chosen of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlhf_ray.cli.examples import examples

EXAMPLES = (
    "generate runs/demo-sft/final --prompts prompts.jsonl --output answers.jsonl",
    "generate POLICY --prompts prompts.jsonl --samples 16 --reward REWARD_MODEL --select best --output best.jsonl",
    "generate POLICY --prompts prompts.jsonl --samples 8 --reward http://HOST:5000 --select worst-best --output pairs.jsonl",
    "generate POLICY --prompts gsm8k.jsonl --samples 4 --reward gsm8k --select top-k --top 2 --output right.jsonl",
)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "generate",
        help="answer a file of prompts, score the answers, choose among them",
        description="Answers every prompt; the same command goes on after an interruption. OUTPUT holds the chosen rows, which "
        "rlhf-ray train reads; all answers are kept beside it.",
        **examples(*EXAMPLES),
    )
    command.add_argument("model", help="a directory or hub id of the model that answers")
    command.add_argument(
        "overrides",
        nargs="*",
        default=[],
        metavar="key=value",
        help="of the recipe, such as rollout.max_new_tokens=1024",
    )
    command.add_argument("--prompts", type=Path, help="rows with a prompt: a text or a conversation")
    command.add_argument("--output", required=True, type=Path, help="a .jsonl file for the chosen rows")
    command.add_argument("--samples", type=int, metavar="N", help="answers to each prompt (default: 1)")
    command.add_argument(
        "--reward", metavar="MODEL|URL|FUNCTION", help="a reward model, a scoring service, or a function that scores"
    )
    command.add_argument(
        "--select",
        metavar="WHICH",
        help="which answers become rows: all (the default), best (of each prompt), top-k (its --top best), or worst-best (its "
        "best and worst as a pair)",
    )
    command.add_argument("--top", type=int, metavar="K", help="of each prompt, for --select top-k")
    command.add_argument("--greedy", action="store_true", help="the likeliest token each time")
    command.add_argument("--config", default="generate", help="a file or recipe of kind generate")
    command.add_argument("--overwrite", action="store_true", help="let the rows take the place of the file at --output")
    command.add_argument("--in-process", action="store_true", help="in this process, without Ray, to debug it")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check everything, answer what is left, and print what came of it; raises :class:`ResumableStop` on a request to stop."""
    from rlhf_ray.launch.parent import with_own_ray
    from rlhf_ray.launch.sampling.request import generate_config
    from rlhf_ray.storage import OutputFile

    config = generate_config(
        options.model,
        options.prompts,
        recipe=options.config,
        reward=options.reward,
        overrides=options.overrides,
        samples=options.samples,
        select=options.select,
        top=options.top,
        greedy=options.greedy or None,
    )
    reads = [Path(path) for _, path in config.data_paths()]
    output = OutputFile(options.output, overwrite=options.overwrite, reads=reads, ending=".jsonl")
    output.check()
    place = None
    if options.in_process:
        from rlhf_ray.launch.in_process import place_for_generating

        place = place_for_generating(config)

    def work() -> int:
        from rlhf_ray.launch.sampling.figures import print_report
        from rlhf_ray.launch.sampling.generate import generate

        print_report(generate(config, output, place=place))
        return 0

    return work() if options.in_process else with_own_ray(config, options.arguments, work)
