"""How a run goes on: with which config, from which checkpoint, and over which inputs.

Invariants: a run that has finished is left as it is, unless it is to become longer. What is refused is refused before a line
of the run is moved; what is refused after that, before its first step, leaves config and record as they were. A change is the
same whether it was asked for or written into ``config.yaml`` by hand, and stands in ``attempts.jsonl`` before the run knows it
(``inputs.json``), so that no kill leaves a change that is not on record.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_ray import storage
from rlhf_ray.config.jobs.base import Job, TrainingJob
from rlhf_ray.config.loading import dump_config, load_config, parse_config
from rlhf_ray.config.paths import run_directory, with_absolute_paths
from rlhf_ray.console import get_logger
from rlhf_ray.errors import CapacityError, ConfigError, RequestError, StorageError
from rlhf_ray.runs.changes import Change, compare, refusals
from rlhf_ray.runs.checkpoints import Checkpoint
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.record import Record, read_record, write_record


@dataclass(frozen=True)
class Continuation:
    """The config that a run goes on with, the one that it had, and every change between them."""

    config: TrainingJob
    before: TrainingJob
    changes: Sequence[Change] = ()

    @property
    def is_longer(self) -> bool:
        """Whether the run ends later than it was to."""
        return _length(self.config) > _length(self.before)


@dataclass(frozen=True)
class Resumed:
    """A run that this process owns and that has begun another attempt, after ``checkpoint`` or from its start."""

    config: TrainingJob
    run: RunDirectory
    checkpoint: Checkpoint | None
    before: Mapping[Path, bytes] = field(default_factory=dict)
    """What the files held that say what the run is, as far as they were there."""

    def take_back(self) -> None:
        """Undo the attempt, unless a step was made in it: the run is then as it was, and the attempt is void."""
        run, start = self.run, 0 if self.checkpoint is None else self.checkpoint.step
        steps = [line["step"] for line in run.metrics.read()] + run.checkpoints.steps()
        if max(steps, default=0) > start:
            return
        try:
            for path in _files_that_say_what_a_run_is(run):
                if path in self.before:
                    storage.write_file(path, self.before[path])
                else:
                    path.unlink(missing_ok=True)
            run.void_attempt()
        except StorageError as error:
            get_logger("runs").error("what this resume has changed stays changed: %s", error)


def _files_that_say_what_a_run_is(run: RunDirectory) -> tuple[Path, ...]:
    ended = (run.summary_path, run.closing_path, run.void_summary_path)
    return run.config_path, run.inputs_path, run.execution_path, *ended


def plan_continuation(run: RunDirectory, overrides: Sequence[str] = (), *, files: bool = False) -> Continuation | None:
    """What ``config.yaml`` and ``overrides`` make of a run; none where it has finished and nothing is left to do.

    With ``files`` the files that its config names are checked too. Raises :class:`ConfigError` with every key that may not
    change, and :class:`RequestError` where a finished run would not become longer.
    """
    here = Path.cwd()
    new = with_absolute_paths(load_config(run.config_path, overrides, files=files), here).to_train()
    old = with_absolute_paths(_config_before(run), here).to_train()
    if type(old) is not type(new):
        raise ConfigError(
            [f"kind: it is {old.kind} in this run and cannot become {new.kind}: start a new run"], str(run.path)
        )
    changes = [change for change in compare(old, new) if not _names_its_place(change, new, run)]
    if refused := refusals(changes):
        raise ConfigError(refused, str(run.path))
    continuation = Continuation(new, old, changes)
    if not run.is_finished or continuation.is_longer:
        return continuation
    longer = f"{new.length_key}=N, with N above {_length(old):g}" if new.length_key else ""
    if changes:
        way = f"make it longer too ({longer}), or start a new run" if longer else "start a new run"
        raise RequestError(f"the run {run.path} has finished, so {changes[0]} would change nothing: {way}")
    hint = f"; to train it further: rlhf-ray resume {run.path} {longer}" if longer else ""
    get_logger("runs").info("the run %s has finished: there is nothing left to do%s", run.path, hint)
    return None


def _config_before(run: RunDirectory) -> Job:
    """The config of the last attempt; that in ``config.yaml`` where the run does not know it, or cannot read it any more."""
    record = read_record(run.inputs_path)
    if record is not None:
        try:
            return parse_config(record.config, source=str(run.inputs_path))
        except ConfigError as error:
            get_logger("runs").warning("what changed since the last attempt is not known: %s", error)
    return load_config(run.config_path)


def _names_its_place(change: Change, config: TrainingJob, run: RunDirectory) -> bool:
    """Whether the name or the place of a run was changed to where the directory really is: it was moved or copied."""
    return change.key in ("run.name", "run.root") and run_directory(config).resolve() == run.path.resolve()


def resume_run(path: str | Path, overrides: Sequence[str] = (), accept: Collection[str] = ()) -> Resumed | None:
    """Own a run and begin another attempt; none where it has finished. ``accept`` names inputs that may have changed.

    The caller releases the run. Raises what :func:`plan_continuation` raises, and :class:`ConfigError` with every input that
    changed on disk and was not accepted.
    """
    run = RunDirectory.take(path)
    try:
        resumed = _resume(run, overrides, accept)
    except BaseException:
        run.release()
        raise
    if resumed is None:
        run.release()
    return resumed


def _resume(run: RunDirectory, overrides: Sequence[str], accept: Collection[str]) -> Resumed | None:
    from rlhf_ray.runs.inputs import compare_inputs, fingerprint_inputs, frozen_models

    continuation = plan_continuation(run, overrides)
    if continuation is None:
        return None
    config, changes = continuation.config, continuation.changes
    run.checkpoints.keep = max(run.checkpoints.keep, config.checkpoint.keep)
    checkpoint = run.checkpoints.latest_valid()
    if checkpoint is not None:
        _check_job(config, checkpoint)
    _check_length(config, run, checkpoint)
    now, record = fingerprint_inputs(config), read_record(run.inputs_path)
    known = None if record is None else record.inputs
    if known is None and any(change.rule.kind == "content" for change in changes):
        known = fingerprint_inputs(continuation.before)  # what lies at the place that the run had can still be read
    accepted = compare_inputs(known, now, run=run.path, changes=changes, accept=accept, frozen=frozen_models(config))
    for change in changes:
        get_logger("runs").info("%s%s", change, f" ({change.rule.text})" if change.rule.text else "")
    for one in accepted:
        get_logger("runs").warning("%s: accepted as it is now: fingerprint %s -> %s", one.key, one.before, one.after)
    text = dump_config(config)
    before = {path: path.read_bytes() for path in _files_that_say_what_a_run_is(run) if path.exists()}
    run.go_on(
        checkpoint,
        config=text if changes else None,
        longer=continuation.is_longer,
        changes=[change.to_json() for change in changes],
        accepted=[one.to_json() for one in accepted],
    )
    write_record(run.inputs_path, Record(text, {**(known or {}), **now}))
    return Resumed(config, run, checkpoint, before)


@contextmanager
def naming_fewer_ranks(config: TrainingJob, run: RunDirectory) -> Iterator[None]:
    """Say in a :class:`CapacityError` of the ``with`` block how a run that has a checkpoint goes on with fewer ranks."""
    try:
        yield
    except CapacityError as error:
        several = [
            f"{key}.ranks=1" for key, role in config.roles().items() if role.config.ranks > 1 and not role.derived
        ]
        if not several or not run.checkpoints.steps():
            raise
        raise CapacityError(
            f"{error}\nTo go on with fewer ranks, if the machines are gone for good: rlhf-ray resume {run.path} "
            f"{' '.join(several)}"
        ) from error


TRAINED = ("policy", "critic", "reward")
"""Roles that learn in some job; a checkpoint has a directory for each that learns in its own."""


def _check_job(config: TrainingJob, checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint of another kind of job or another algorithm, which somebody put here."""
    held = {name for name in TRAINED if (checkpoint.path / name).is_dir()}
    trained = {key for key, role in config.roles().items() if role.trained}
    way = "put the checkpoints of this run back in its place, or start a new run"
    if held and held != trained:
        theirs, ours = (" and ".join(sorted(roles)) for roles in (held, trained))
        raise RequestError(f"{checkpoint.path} holds the training of {theirs}, and this run trains {ours}: {way}")
    try:
        config.length_done(checkpoint.manifest.about["state"])
    except (KeyError, TypeError) as error:
        raise RequestError(
            f"{checkpoint.path} is not of a job of kind {config.kind} (it has no {error}): {way}"
        ) from error


def _check_length(config: TrainingJob, run: RunDirectory, checkpoint: Checkpoint | None) -> None:
    """Refuse a run that would end before it goes on, or that has nothing to go on from although it has finished."""
    if checkpoint is None:
        if run.is_finished:
            raise RequestError(
                f"the run {run.path} has finished and kept no commit to go on from (checkpoint.every_steps was 0): start a new "
                f"run whose model begins at {run.final}"
            )
        return
    state: dict[str, Any] = checkpoint.manifest.about["state"]
    done = config.length_done(state)
    if config.length_key and _length(config) + 1e-9 < done:
        raise ConfigError(
            [
                f"{config.length_key}: {_length(config):g} is less than the {done:g} that the run has done at its last "
                f"checkpoint (step {checkpoint.step}): ask for {done:g} or more"
            ],
            str(run.path),
        )


def _length(config: TrainingJob) -> float:
    """How long the run is, in the unit of ``length_key``; 0 where the job does not say."""
    return float(getattr(config, config.length_key)) if config.length_key else 0.0
