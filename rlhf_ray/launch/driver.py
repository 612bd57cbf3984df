"""The driver process of one run: it reads the data, joins the cluster and runs the trainer that the job names.

Invariants: all data is read and checked before Ray starts; every ending is an exit code, and a mistake of the user is one
message without a stack trace; a run that was refused before its first step leaves nothing behind, and removes nothing that it
did not make; a run that has finished is never trained again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlhf_ray import environment
from rlhf_ray.config.jobs.base import Job, TrainingJob
from rlhf_ray.config.loading import dump_config, load_config, parse_config
from rlhf_ray.config.paths import run_directory
from rlhf_ray.config.preflight import hub_ids
from rlhf_ray.config.recipes import CONFIG_NAME
from rlhf_ray.console import get_logger
from rlhf_ray.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    CapacityError,
    RequestError,
    ResumableStop,
    RlhfRayError,
)
from rlhf_ray.imports import import_object, quick_imports
from rlhf_ray.processes import lifeline, spans, stacks
from rlhf_ray.runs.checkpoints import Checkpoint
from rlhf_ray.runs.clusters import on_its_cluster
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.record import Record, write_record
from rlhf_ray.runs.reporting import close_run
from rlhf_ray.runs.resuming import naming_fewer_ranks, resume_run
from rlhf_ray.runs.trust import refuse_untrusted
from rlhf_ray.trainers import stopping

if TYPE_CHECKING:
    from rlhf_ray.actors.place import Place


class Trainer(Protocol):
    """The function that a job names as its trainer; it knows the class of the job."""

    def __call__(
        self, config: Any, run: RunDirectory, checkpoint: Checkpoint | None, /, *, place: Place | None
    ) -> None: ...


def main(arguments: Sequence[str] | None = None) -> int:
    """Train a new run, whose resolved config comes on standard input, or resume one; returns the exit code."""
    parser = argparse.ArgumentParser(prog="rlhf_ray.launch.driver")
    parser.add_argument("--resume", metavar="RUN_DIR")
    parser.add_argument("--accept", metavar="KEY", action="append", default=[])
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="changes of the config of a resumed run")
    options = parser.parse_args(arguments)
    environment.prepare()
    stacks.offer("driver")
    if options.resume is None:
        return exit_code(lambda: train_new_run(sys.stdin.read()))
    return exit_code(lambda: continue_run(options.resume, options.overrides, options.accept))


def exit_code(work: Callable[[], None]) -> int:
    """Do ``work`` and return the exit code of its ending; only an unexpected failure shows a stack trace."""
    try:
        stopping.listen()
        lifeline.connect()
        work()
    except RlhfRayError as error:
        if not error.is_told:
            get_logger().error("%s", error)
        return error.exit_code
    except KeyboardInterrupt:
        stopped = stopping.interrupted()
        get_logger().info("%s", stopped)
        return stopped.exit_code
    except Exception:
        get_logger().exception("the driver failed")
        return EXIT_FAILED
    return EXIT_DONE


def train_new_run(text: str, *, place: Place | None = None) -> None:
    """Make the run directory of a config and train from the start; ``place`` as in :func:`run_trainer`."""
    config = parse_config(text).to_train()
    with new_run(config) as run:
        run_trainer(config, run, None, place=place)


def continue_run(
    path: str, overrides: Sequence[str] = (), accept: Collection[str] = (), *, place: Place | None = None
) -> None:
    """Train on from the last valid checkpoint of a run, or from its start where none was committed.

    ``overrides`` change its config, and ``accept`` names inputs that may have changed. A run that has finished stays as it
    is; of one that lacks only its report, write that. ``place`` is as in :func:`run_trainer`.
    """
    refuse_untrusted(path)
    _may_ask_hub(load_config(Path(path) / CONFIG_NAME))
    with quick_imports():
        resumed = resume_run(path, overrides, accept)
    if resumed is None:
        return
    config, run = resumed.config, resumed.run
    try:
        if run.closing_path.exists():
            close_run(run, keep_commit=config.checkpoint.every_steps != 0)
            get_logger().info("the run was trained and evaluated; its report was missing: %s", run.report_path)
        else:
            run_trainer(on_its_cluster(config, run), run, resumed.checkpoint, place=place)
    except (RequestError, CapacityError):
        resumed.take_back()
        raise
    finally:
        run.release()


@contextmanager
def new_run(config: TrainingJob) -> Iterator[RunDirectory]:
    """A new run in ``run.root/run.name``, owned in the ``with`` block; discarded if it is refused before its first step."""
    run = RunDirectory.create(run_directory(config), dump_config(config), config.checkpoint.keep)
    try:
        yield run
    except (RequestError, CapacityError):
        if not (run.metrics.read() or run.checkpoints.steps() or run.final.exists()):
            # Nothing has begun, so the name becomes free again.
            run.discard()
        raise
    finally:
        run.release()


def run_trainer(
    config: TrainingJob, run: RunDirectory, checkpoint: Checkpoint | None, *, place: Place | None = None
) -> None:
    """Run the trainer that the job names in this process, from ``checkpoint`` or from the start.

    ``place`` is where ranks live; none means a Ray cluster. Raises :class:`ResumableStop` on a request to stop.
    """
    _may_ask_hub(config)
    with quick_imports():
        from rlhf_ray.runs.inputs import fingerprint_inputs

        train: Trainer = import_object(config.trainer)
    if not run.inputs_path.exists():
        write_record(run.inputs_path, Record(dump_config(config), fingerprint_inputs(config)))
    try:
        stopping.listen()
        with naming_fewer_ranks(config, run), _recording(config, run):
            train(config, run, checkpoint, place=place)
    except ResumableStop:
        run.note_stop()
        raise
    except KeyboardInterrupt as error:  # Ray makes a plain one of what is raised while it waits
        run.note_stop()
        raise ResumableStop(
            f"stopped on request before the first step; go on with: rlhf-ray resume {run.path}"
        ) from error


def _recording(config: TrainingJob, run: RunDirectory) -> AbstractContextManager[None]:
    """Record the spans of the run, if it is to have any."""
    monitoring = config.monitoring
    if not monitoring.spans:
        return nullcontext()
    return spans.recording(run.spans, run.open_telemetry if monitoring.open_telemetry else None)


def _may_ask_hub(config: Job) -> None:
    """The driver reads the tokenizer and the rows itself, so it may ask the hub where the job names it."""
    if hub_ids(config):
        environment.allow_hub()


if __name__ == "__main__":
    sys.exit(main())
