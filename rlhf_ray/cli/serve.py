"""The command ``rlhf-ray serve``: serve a reward model over HTTP."""

from __future__ import annotations

import argparse
from typing import Any

from rlhf_ray.cli.examples import examples

EXAMPLES = (
    "serve runs/demo-rm/final --port 5000",
    "serve runs/demo-rm/final --host 0.0.0.0 --token-file tokens.txt reward.ranks=2",
)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "serve",
        help="serve a reward model over HTTP",
        **examples(*EXAMPLES),
    )
    command.add_argument("model", help="a directory or hub id of a reward model")
    command.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="of the recipe serve, such as port=5001"
    )
    command.add_argument("--host")
    command.add_argument("--port", type=int)
    command.add_argument("--token-file", help="a file with one token per line; needed for any host but this machine")
    command.add_argument("--normalize", action="store_true", help="answer normalised rewards instead of raw scores")
    command.add_argument("--detach", action="store_true", help="leave it running on the cluster")
    command.add_argument("--reload", action="store_true", help="let the model take the place of the one that is served")
    command.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Check the config, then serve until stopped, or reload."""
    import json

    from rlhf_ray.config.jobs.serve import ServeConfig
    from rlhf_ray.config.loading import load_job
    from rlhf_ray.launch.parent import with_own_ray

    options = {
        "reward.model.path": arguments.model,
        "host": arguments.host,
        "port": arguments.port,
        "token_file": arguments.token_file,
        "normalize": arguments.normalize or None,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    overrides += arguments.overrides
    config = load_job(ServeConfig, "serve", overrides, files=True)

    def work() -> int:
        from rlhf_ray.launch.serve import serve

        return serve(config, detach=arguments.detach)

    if not arguments.reload:
        return with_own_ray(config, arguments.arguments, work)

    from rlhf_ray.launch.serve import reload

    keys = [override.partition("=")[0].strip() for override in overrides]
    return reload(config, [*keys, *(["--detach"] if arguments.detach else [])])
