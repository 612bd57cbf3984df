"""Measure this project, print the figures and keep them: ``python -m benchmarks.run [--only PART,PART] [--keep]``.

Invariants: every part stands in ``PARTS`` and can run alone. A part that fails costs no other part its figures, and the
exit code says that one failed. ``--quick`` shrinks sizes to show that the parts run: its numbers mean nothing, go only
into the file that ``--results`` names, and can never be kept as reference.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.figures import LATEST, REFERENCE, Figures, record, table
from rlhf_ray import environment

PARTS = (
    "checkpoints",
    "demo",
    "dpo",
    "encoders",
    "generate",
    "gym",
    "gym_turns",
    "learning",
    "log_probs",
    "models",
    "ppo",
    "reward_training",
    "rollout_modes",
    "scoring",
    "sft",
    "watching",
    "weight_ways",
    "weights",
)
"""Modules of this directory; ``measure(quick)`` of each returns its figures."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts, or all; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.run", description="measure and keep the figures")
    parser.add_argument(
        "--only", type=_parts, default=PARTS, metavar="PART[,PART...]", help=f"some of {', '.join(PARTS)}"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that the parts run, measures nothing")
    parser.add_argument(
        "--results", type=Path, help=f"file for the figures (default: {LATEST.name}, none with --quick)"
    )
    parser.add_argument("--keep", action="store_true", help=f"also merge the figures into {REFERENCE.name}")
    options = parser.parse_args(arguments)
    results = options.results or (None if options.quick else LATEST)
    if options.quick and (options.keep or (results is not None and results.resolve() == REFERENCE)):
        parser.error(f"a quick run measures nothing: run without --quick to keep figures in {REFERENCE.name}")
    environment.prepare()
    files = [path for path in (results, REFERENCE if options.keep else None) if path is not None]
    failed = [part for part in options.only if not _run(part, options.quick, files)]
    for part in failed:
        print(f"{part} failed", file=sys.stderr)
    return 1 if failed else 0


def _parts(text: str) -> tuple[str, ...]:
    """The parts that ``--only`` names."""
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in PARTS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{', '.join(unknown)} is no part: choose from {', '.join(PARTS)}")
    return names


def _run(part: str, quick: bool, files: Sequence[Path]) -> bool:
    """Run one part and keep its figures at once; returns whether it succeeded."""
    measure: Callable[[bool], Figures] = import_module(f"benchmarks.{part}").measure
    try:
        figures = measure(quick)
    except Exception:
        traceback.print_exc()
        return False
    print(table(figures), flush=True)
    for path in files:
        record(figures, path)
    return True


if __name__ == "__main__":
    sys.exit(main())
