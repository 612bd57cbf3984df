"""The command ``rlhf-ray submit``: run a job on a Ray cluster through its job server."""

from __future__ import annotations

import argparse
from typing import Any

from rlhf_ray.cli.examples import examples

EXAMPLES = (
    "submit demo-ppo --address http://127.0.0.1:8265",
    "submit my-ppo.yaml run.root=/shared/runs --no-wait",
    "submit --resume /shared/runs/my-ppo",
)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "submit",
        help="run a job on a Ray cluster through ray job submit",
        **examples(*EXAMPLES, with_recipes=True),
    )
    command.add_argument("config", nargs="?", help="a file, or the name of a shipped recipe")
    command.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="for example run.seed=1")
    command.add_argument("--address", default=None, help="the cluster's dashboard (default: RAY_API_SERVER_ADDRESS, or "
                         "http://127.0.0.1:8265)")  # fmt: skip
    command.add_argument("--resume", metavar="RUN_DIRECTORY", help="instead of a new run, go on with this one, which the "
                         "cluster must see under the same name")  # fmt: skip
    command.add_argument(
        "--accept", action="append", default=[], metavar="KEY", help="with --resume: as of rlhf-ray resume"
    )
    command.add_argument("--no-wait", action="store_true", help="print the job's id and return")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Check the config here, submit it, stream its log, end with the driver's exit code."""
    from rlhf_ray.config.loading import load_config
    from rlhf_ray.errors import RequestError
    from rlhf_ray.launch.submit import submit, submit_resume

    words = [word for word in (options.config, *options.overrides) if word is not None]
    if options.resume is not None:
        words += [word for key in options.accept for word in ("--accept", key)]
        return submit_resume(options.resume, words, address=options.address, wait=not options.no_wait)
    if not words:
        raise RequestError("submit needs a config (a file or the name of a recipe), or --resume RUN_DIRECTORY")
    return submit(load_config(words[0], words[1:]), address=options.address, wait=not options.no_wait)
