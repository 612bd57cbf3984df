"""``rlhf-ray serve MODEL``."""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(commands: Any) -> None:
    """Add this verb."""
    command = commands.add_parser("serve", help="serve a reward model over HTTP")
    command.add_argument("model", help="a directory or hub id of a reward model")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="of the recipe serve, such as port=5001")
    command.add_argument("--host")
    command.add_argument("--port", type=int)
    command.add_argument("--token-file", help="tokens that may ask, one a line; needed for any host but this machine")
    command.add_argument("--normalize", action="store_true", help="answer normalised rewards instead of raw scores")
    command.add_argument("--detach", action="store_true", help="leave it running on the cluster")
    command.add_argument("--reload", action="store_true", help="put the model in the place of the one that is served")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Check, start, keep up."""
    import json

    from rlhf_ray.config.loading import load_config
    from rlhf_ray.launch.serve import reload, serve

    options = {
        "reward.model.path": given.model,
        "host": given.host,
        "port": given.port,
        "token_file": given.token_file,
        "normalize": given.normalize or None,
    }
    overrides = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    config = load_config("serve", [*overrides, *given.overrides], kind="serve", files=True)
    return reload(config) if given.reload else serve(config, detach=given.detach)
