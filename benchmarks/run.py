"""``python -m benchmarks.run [--only PART] [--quick]``: measure, print a table, keep the figures.

Always true: every part stands in ``PARTS`` and can be run alone; a part that fails costs no other part its figures, and
the exit code tells. ``--quick`` shrinks sizes to see that the parts run: its numbers mean nothing, and are kept only
where ``--results`` says.
"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.figures import LATEST, Figures, record, table
from rlhf_ray import environment

PARTS = (
    "learning",
    "log_probs",
    "models",
    "reward_training",
    "scoring",
    "weights",
)
"""Modules of this directory; ``measure(quick)`` of each returns its figures."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts that were asked for; returns the exit code."""
    parser = argparse.ArgumentParser(prog="benchmarks.run", description="measure and keep the figures")
    parser.add_argument("--only", choices=PARTS, metavar="PART", help=f"one of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that the parts run, measures nothing")
    parser.add_argument(
        "--results", type=Path, help=f"file for the figures (default: {LATEST.name}, none with --quick)"
    )
    given = parser.parse_args(arguments)
    environment.prepare()
    results = given.results or (None if given.quick else LATEST)
    failed = [part for part in ([given.only] if given.only else PARTS) if not _run(part, given.quick, results)]
    for part in failed:
        print(f"{part} failed", file=sys.stderr)
    return 1 if failed else 0


def _run(part: str, quick: bool, results: Path | None) -> bool:
    """Run one part and keep its figures at once; whether it went well."""
    measure: Callable[[bool], Figures] = import_module(f"benchmarks.{part}").measure
    try:
        figures = measure(quick)
    except Exception:
        traceback.print_exc()
        return False
    print(table(figures), flush=True)
    if results is not None:
        record(figures, results)
    return True


if __name__ == "__main__":
    sys.exit(main())
