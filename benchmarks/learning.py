"""Part ``learning``: how well each algorithm learns the generated world on three seeds, in one process without Ray.

    python -m benchmarks.learning --root DIR [--pieces N] [--keep]

runs the same work in pieces of a few minutes; the command can be stopped and repeated at any time. The runs themselves are
in ``learning_runs``, and what is measured of them in ``learning_figures``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.figures import LATEST, REFERENCE, Figures, record, table
from benchmarks.learning_figures import figures
from benchmarks.learning_runs import SEEDS, finished, piece_directory, pieces, run_piece
from rlhf_ray import environment


def measure(quick: bool = False) -> Figures:
    """Run all pieces, one after the other, in a temporary directory."""
    seeds = SEEDS[:1] if quick else SEEDS
    with tempfile.TemporaryDirectory() as directory:
        for piece in pieces(seeds):
            run_piece(Path(directory), piece, quick=quick)
        return figures(Path(directory), seeds)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run pieces that have not finished, and keep the figures once all have."""
    parser = argparse.ArgumentParser(prog="benchmarks.learning", description="the part learning, in pieces")
    parser.add_argument("--root", type=Path, required=True, help="where runs are kept")
    parser.add_argument("--pieces", type=int, help="run at most this many pieces")
    parser.add_argument("--keep", action="store_true", help=f"also merge the figures into {REFERENCE.name}")
    options = parser.parse_args(arguments)
    environment.prepare()
    unfinished = [piece for piece in pieces() if not finished(piece_directory(options.root, piece))]
    for piece in unfinished[: options.pieces]:
        print("piece", json.dumps(asdict(piece)), flush=True)
        run_piece(options.root, piece)
    if options.pieces is None or options.pieces >= len(unfinished):
        measured = figures(options.root)
        print(table(measured))
        for path in (LATEST, REFERENCE) if options.keep else (LATEST,):
            record(measured, path)


if __name__ == "__main__":
    main()
