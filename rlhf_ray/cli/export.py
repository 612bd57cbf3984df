"""``rlhf-ray export SOURCE OUT``."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_arguments(commands: Any) -> None:
    """Add this verb."""
    command = commands.add_parser("export", help="write a plain Hugging Face directory: adapters merged, safetensors")
    command.add_argument("source", help="a run directory, a model directory, an adapter or a hub id")
    command.add_argument("out", help="a directory that does not exist yet")
    command.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="default: as stored")
    command.add_argument("--head-prefix", default="score", help="name of the score head, for OpenRLHF (default: score)")
    command.add_argument("--trust-remote-code", action="store_true", help="run Python code that the model brings")
    command.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Load, merge, write; print where."""
    from rlhf_ray.launch.export import export

    out = export(
        given.source,
        given.out,
        dtype=given.dtype,
        head_prefix=given.head_prefix,
        trust_remote_code=given.trust_remote_code,
    )
    sys.stdout.write(f"{out}\n")
    return 0
