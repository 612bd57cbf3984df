"""The command ``rlhf-ray evaluate``: compare a reward model with a file of preferences."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlhf_ray.cli.examples import examples

EXAMPLES = ("evaluate runs/demo-rm/final --data pairs.jsonl --output figures.json",)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "evaluate",
        help="compare a reward model with a file of preferences",
        **examples(*EXAMPLES),
    )
    command.add_argument("model", help="a directory or hub id of a reward model")
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="of the recipe serve, such as reward.ranks=2"
    )
    command.add_argument(
        "--data", required=True, type=Path, help="preference pairs in any layout; RewardBench's and RewardBench 2's too"
    )
    command.add_argument("--prompt-key", default="prompt")
    command.add_argument("--chosen-key", default="chosen")
    command.add_argument("--rejected-key", default="rejected")
    command.add_argument(
        "--apply-chat-template", action="store_true", help="make turns of plain prompts and answers, as for RewardBench"
    )
    command.add_argument("--output", type=Path, help="a .json file for all figures, the worst pairs among them")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check, score, print the tables."""
    import json

    from rlhf_ray.config.jobs.serve import ServeConfig
    from rlhf_ray.config.loading import load_job
    from rlhf_ray.launch.evaluate import evaluate
    from rlhf_ray.rows.layouts import Keys

    model = f"reward.model.path={json.dumps(options.model)}"
    config = load_job(ServeConfig, "serve", [model, "run.name=evaluate", *options.overrides], files=True)
    keys = Keys(options.prompt_key, options.chosen_key, options.rejected_key)
    return evaluate(config, options.data, keys, turns=options.apply_chat_template, output=options.output)
