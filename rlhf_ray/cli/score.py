"""The command ``rlhf-ray score``: score a file of items with a reward model."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rlhf_ray.cli.examples import examples

EXAMPLES = ("score runs/demo-rm/final --input items.jsonl --output scores.jsonl",)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "score",
        help="score a file of items with a reward model",
        **examples(*EXAMPLES),
    )
    command.add_argument("model", help="a directory or hub id of a reward model")
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="of the recipe serve, such as reward.ranks=2"
    )
    command.add_argument(
        "--input", required=True, type=Path, help="rows with token_ids, text, messages, or prompt, response"
    )
    command.add_argument("--output", required=True, type=Path, help="a .jsonl file: the rows, each with its score")
    command.add_argument(
        "--truncate", action="store_true", help="cut what is too long from the left instead of refusing it"
    )
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check, score, say what has no score; raises :class:`ResumableStop` on a request to stop."""
    import json

    from rlhf_ray.config.jobs.serve import ServeConfig
    from rlhf_ray.config.loading import load_job
    from rlhf_ray.launch.parent import with_own_ray

    def work() -> int:
        from rlhf_ray.launch.score import score

        return score(config, options.input, options.output, truncate=options.truncate)

    model = f"reward.model.path={json.dumps(options.model)}"
    config = load_job(ServeConfig, "serve", [model, "run.name=score", *options.overrides], files=True)
    return with_own_ray(config, options.arguments, work)
