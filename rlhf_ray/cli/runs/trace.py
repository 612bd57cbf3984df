"""The command ``rlhf-ray trace``: write what every process of a run did when, for a viewer of traces."""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

from rlhf_ray.cli.examples import examples
from rlhf_ray.console import printable, write_result
from rlhf_ray.errors import RequestError

EXAMPLES = (
    "trace runs/demo-ppo --output trace.json",
    "trace runs/demo-ppo --steps 10-12 --output steps.json",
)


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "trace",
        help="write what every process of a run did when, as a file for ui.perfetto.dev",
        **examples(*EXAMPLES),
    )
    command.add_argument("run_directory", metavar="RUN_DIR")
    command.add_argument(
        "--steps", metavar="A-B", help="only these steps, such as 7 or 10-12 (default: everything recorded)"
    )
    command.add_argument("--output", required=True, help="the file to write")
    command.add_argument("--overwrite", action="store_true", help="let --output take the place of a file of yours")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the file and print where it lies."""
    from rlhf_ray.monitoring.spans.chrome import trace
    from rlhf_ray.monitoring.spans.reading import SpanFiles
    from rlhf_ray.runs.directory import RunDirectory
    from rlhf_ray.storage.output import OutputFile

    first, last = _steps(options.steps)
    run = RunDirectory.open(options.run_directory)
    file = OutputFile(Path(options.output), overwrite=options.overwrite, reads=run.files())
    file.check()
    attempts = SpanFiles(run.spans).read().attempts()
    if not attempts:
        raise RequestError(f"{run.path} has no spans: it was trained with monitoring.spans=false, or has not begun")
    known = sorted({step.number for attempt in attempts for step in attempt.steps()})
    if last is not None and not any(first <= number <= last for number in known):
        there = f"steps {known[0]} to {known[-1]} are" if known else "none is"
        raise RequestError(f"--steps {options.steps}: no such step is recorded in {run.spans}, {there}")
    content = trace(attempts, first, last)
    write_result(f"{printable(str(file.write(json.dumps(content, separators=(',', ':')))))}\n")
    return 0


def _steps(text: str | None) -> tuple[int, int | None]:
    if text is None:
        return 0, None
    match = re.fullmatch(r"(\d{1,12})(?:-(\d{1,12}))?", text)
    first, last = (0, 0) if match is None else (int(match[1]), int(match[2] or match[1]))
    if match is None or last < first:
        raise RequestError(
            f"--steps {text} is neither a step nor two of them in their order: write it as 7 or as 10-12"
        )
    return first, last
