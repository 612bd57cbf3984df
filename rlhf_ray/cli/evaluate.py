"""``rlhf-ray evaluate MODEL --data FILE``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_arguments(commands: Any) -> None:
    """Add this verb."""
    command = commands.add_parser("evaluate", help="hold a reward model against a file of preferences")
    command.add_argument("model", help="a directory or hub id of a reward model")
    command.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of the recipe serve, such as reward.ranks=2"
    )
    command.add_argument("--data", required=True, type=Path, help="preference pairs in any layout; RewardBench's too")
    command.add_argument("--prompt-key", default="prompt")
    command.add_argument("--chosen-key", default="chosen")
    command.add_argument("--rejected-key", default="rejected")
    command.add_argument(
        "--apply-chat-template", action="store_true", help="make turns of plain prompts and answers, as for RewardBench"
    )
    command.add_argument("--output", type=Path, help="a .json file for all figures, the worst pairs among them")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Check, score, print the tables."""
    import json

    from rlhf_ray.config.jobs.serve import ServeConfig
    from rlhf_ray.config.loading import load_job
    from rlhf_ray.launch.evaluate import evaluate
    from rlhf_ray.rows.layouts import Keys

    model = f"reward.model.path={json.dumps(given.model)}"
    config = load_job(ServeConfig, "serve", [model, "run.name=evaluate", *given.overrides], files=True)
    keys = Keys(given.prompt_key, given.chosen_key, given.rejected_key)
    return evaluate(config, given.data, keys, turns=given.apply_chat_template, output=given.output)
