"""How a run goes on: with which config, from which checkpoint, and over which inputs.

Invariants: a run that has finished is left as it is, unless it is to become longer. What is refused is refused before a line
of the run is moved. What changes is in ``attempts.jsonl`` before it is in ``config.yaml`` or ``inputs.json``, so that the
record never lacks a change that counts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.config.jobs.base import TrainingJob
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.config.paths import with_absolute_paths
from rlhf_ray.console import get_logger
from rlhf_ray.errors import ConfigError, RequestError
from rlhf_ray.runs.changes import Change, compare, refusals
from rlhf_ray.runs.checkpoints import Checkpoint
from rlhf_ray.runs.directory import RunDirectory


@dataclass(frozen=True)
class Continuation:
    """The config that a run goes on with, and every change from the one that it had."""

    config: TrainingJob
    changes: Sequence[Change] = ()
    longer: bool = False
    """Whether the run ends later than it was to."""


@dataclass(frozen=True)
class Resumed:
    """A run that this process owns and that has begun another attempt, after ``checkpoint`` or from its start."""

    config: TrainingJob
    run: RunDirectory
    checkpoint: Checkpoint | None


def plan_continuation(run: RunDirectory, overrides: Sequence[str] = (), *, files: bool = False) -> Continuation | None:
    """What ``overrides`` make of a run; none where it has finished and nothing is left to do, which is said.

    With ``files`` the files that its config names are checked too. Raises :class:`ConfigError` with every key that may not
    change, and :class:`RequestError` where a finished run would not become longer.
    """
    here = Path.cwd()
    old = with_absolute_paths(load_config(run.config_path), here).to_train()
    new = (
        with_absolute_paths(load_config(run.config_path, overrides, files=files), here).to_train() if overrides else old
    )
    changes = compare(old, new)
    if refused := refusals(changes):
        raise ConfigError(refused, str(run.path))
    is_longer = _length(new) > _length(old)
    if not run.is_finished or is_longer:
        return Continuation(new, changes, is_longer)
    longer = f"{new.length_key}=N, with N above {_length(old):g}" if new.length_key else ""
    if changes:
        way = f"make it longer too ({longer}), or start a new run" if longer else "start a new run"
        raise RequestError(f"the run {run.path} has finished, so {changes[0]} would change nothing: {way}")
    hint = f"; to train it further: rlhf-ray resume {run.path} {longer}" if longer else ""
    get_logger("runs").info("the run %s has finished: there is nothing left to do%s", run.path, hint)
    return None


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
    from rlhf_ray.runs.inputs import compare_inputs, fingerprint_inputs, read_inputs, write_inputs

    continuation = plan_continuation(run, overrides)
    if continuation is None:
        return None
    config, changes = continuation.config, continuation.changes
    run.checkpoints.keep = max(run.checkpoints.keep, config.checkpoint.keep)
    checkpoint = run.checkpoints.latest_valid()
    _check_length(config, run, checkpoint)
    now = fingerprint_inputs(config)
    known = read_inputs(run.inputs_path)
    accepted = compare_inputs(known, now, run=run.path, changes=changes, accept=accept)
    for change in changes:
        get_logger("runs").info("%s%s", change, f" ({change.rule.text})" if change.rule.text else "")
    for one in accepted:
        get_logger("runs").warning("%s: accepted as it is now: fingerprint %s -> %s", one.key, one.before, one.after)
    run.go_on(
        checkpoint,
        config=dump_config(config) if changes else None,
        longer=continuation.longer,
        changes=[change.to_json() for change in changes],
        accepted=[one.to_json() for one in accepted],
    )
    if (kept := {**(known or {}), **now}) != known:
        write_inputs(run.inputs_path, kept)
    return Resumed(config, run, checkpoint)


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
