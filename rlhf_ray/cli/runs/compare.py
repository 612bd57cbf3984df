"""The command ``rlhf-ray compare``: write a page that shows where runs of one kind differ, and how well each did."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.cli.examples import examples
from rlhf_ray.console import printable, write_result
from rlhf_ray.errors import RequestError

if TYPE_CHECKING:
    from rlhf_ray.monitoring.report.comparison import ComparedRun, Setting
    from rlhf_ray.runs.directory import RunDirectory

EXAMPLES = (
    "compare runs/first runs/second",
    "compare runs/first runs/second runs/third --output three.html",
)
SHOWN_FACTS = ("kind", "started", "took", "steps", "starts", "useful time")


def add_arguments(commands: Any) -> None:
    """Register the command."""
    command = commands.add_parser(
        "compare",
        help="write a page with the differences of runs: settings, final and best values, curves",
        **examples(*EXAMPLES),
    )
    command.add_argument("run_directories", nargs="+", metavar="RUN_DIR")
    command.add_argument("--output", default="comparison.html", help="the file to write (default: %(default)s)")
    command.add_argument("--overwrite", action="store_true", help="let --output take the place of a file of yours")
    command.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write a self-contained HTML file and print where it lies."""
    from rlhf_ray.monitoring.report.comparison import MOST_RUNS, render_comparison
    from rlhf_ray.runs.directory import RunDirectory
    from rlhf_ray.storage.output import OutputFile

    if not 2 <= len(options.run_directories) <= MOST_RUNS:
        raise RequestError(f"compare takes 2 to {MOST_RUNS} run directories, not {len(options.run_directories)}")
    runs = [RunDirectory.open(directory) for directory in options.run_directories]
    for number, one in enumerate(runs):
        if any(one.path.samefile(other.path) for other in runs[:number]):
            raise RequestError(f"{one.path} is named twice: name each run once")
    file = OutputFile(
        Path(options.output), overwrite=options.overwrite, reads=[path for one in runs for path in one.files()]
    )
    file.check()
    compared = [_read(one, options) for one in runs]
    _require_one_kind(runs, compared)
    write_result(f"{printable(str(file.write(render_comparison(compared))))}\n")
    return 0


def _read(one: RunDirectory, options: argparse.Namespace) -> ComparedRun:
    from rlhf_ray.monitoring.report.comparison import ComparedRun
    from rlhf_ray.runs.reporting import facts

    lines = one.metrics.read()
    if not lines:
        raise RequestError(f"{one.path} has no step on record, so there is nothing to compare: wait for its first step")
    names = [Path(directory).resolve().name for directory in options.run_directories]
    name = one.path.resolve().name
    known = {name: value for name, value in facts(one).items() if name in SHOWN_FACTS}
    return ComparedRun(name if names.count(name) == 1 else str(one.path), lines, known, _settings(one))


def _settings(one: RunDirectory) -> dict[str, Setting]:
    """The config as it is shown to others, without secrets, and the fingerprints of what the run is made from."""
    from rlhf_ray.config.reading import read_mapping
    from rlhf_ray.config.shown import flat, shown_value
    from rlhf_ray.config.writing import write_value
    from rlhf_ray.monitoring.report.comparison import Setting
    from rlhf_ray.runs.record import read_record

    document = read_mapping(one.config_text())
    if document.problems:
        raise RequestError(f"{one.config_path} is damaged ({document.problems[0]}): restore it from a backup")
    settings = {
        key: Setting(value, write_value(shown_value(key, value))) for key, value in flat(document.values).items()
    }
    record = read_record(one.inputs_path)
    for key, content in ({} if record is None else record.inputs).items():
        settings[f"content of {key}"] = Setting(content.digest, str(content))
    settings.pop("run.name", None)  # it is at the top of the page
    return settings


def _require_one_kind(runs: list[RunDirectory], compared: list[ComparedRun]) -> None:
    kinds = [one.facts["kind"] for one in compared]
    for directory, kind in zip(runs, kinds, strict=True):
        if kind != kinds[0]:
            raise RequestError(
                f"{runs[0].path} is a run of kind {kinds[0]} and {directory.path} one of kind {kind}, which have no curves in "
                "common: compare runs of one kind, or write both side by side with rlhf-ray report"
            )
