"""The command ``rlhf-ray export``: write a plain Hugging Face directory."""

from __future__ import annotations

import argparse
from typing import Any

from rlhf_ray.cli.examples import examples
from rlhf_ray.console import printable, write_result

EXAMPLES = (
    "export runs/demo-ppo policy",
    "export adapter merged --dtype bf16",
)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "export",
        help="write a plain Hugging Face directory: adapters merged, safetensors",
        **examples(*EXAMPLES),
    )
    command.add_argument("source", help="a run directory, a model directory, an adapter or a hub id")
    command.add_argument("out", help="a directory that does not exist yet")
    command.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: as the weights are stored")
    command.add_argument("--head-prefix", default="score", help="name of the score head, for OpenRLHF (default: score)")
    command.add_argument(
        "--scored-token",
        choices=("end", "before_end"),
        help="of a reward model that does not say it: at which token it is read (default: as transformers reads it)",
    )
    command.add_argument("--trust-remote-code", action="store_true", help="run Python code that the model brings")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Load, merge, write; print where."""
    from rlhf_ray.launch.export import export

    out = export(
        options.source,
        options.out,
        dtype=options.dtype,
        head_prefix=options.head_prefix,
        scored_token=options.scored_token,
        trust_remote_code=options.trust_remote_code,
    )
    write_result(f"{printable(str(out))}\n")
    return 0
