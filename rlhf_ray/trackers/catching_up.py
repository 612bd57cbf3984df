"""Send what trackers lack of a run, for ``rlhf-ray track``.

Invariant: what a run directory asks for is done only if nobody else can have written it there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from rlhf_ray.config.loading import load_config
from rlhf_ray.config.sections.run import MonitoringConfig
from rlhf_ray.config.trackers import missing, target
from rlhf_ray.console import get_logger
from rlhf_ray.errors import EXIT_DONE, EXIT_FAILED, RequestError
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.trust import refuse_untrusted
from rlhf_ray.trackers.follower import follow, say_what_lacks
from rlhf_ray.trackers.state import StateFile


def track(directory: str | Path, to: Sequence[str] = (), *, project: str | None = None, live: bool = False) -> int:
    """Feed the trackers ``to``, or those of the run's config, until they have everything; returns the exit code."""
    refuse_untrusted(directory)
    run = RunDirectory.open(directory)
    known = load_config(run.config_path).to_train().monitoring
    asked = _asked(to or known.trackers, known if project is None else _with_project(known, project))
    if not asked.trackers:
        raise RequestError(
            f"{run.path} has no monitoring.trackers: name one, as in rlhf-ray track {run.path} --to tensorboard"
        )
    targets = [target(text).with_absolute_place(Path.cwd()) for text in asked.trackers]
    for wanted in targets:
        if lacks := missing(wanted):
            raise RequestError(lacks)
    if run.is_owned():
        get_logger("trackers").info("%s is under way: its trackers are fed until it ends", run.path)
    lacking = follow(
        run, targets, project=asked.project, live=live or known.track_live, over=_not_owned(run), patient=False
    )
    say_what_lacks(run, lacking)
    for wanted in targets:
        state = StateFile(run.path, wanted).last()
        if wanted not in lacking and state is not None:
            get_logger("trackers").info("the tracker %s has of %s: %s", wanted, run.path, state.describe())
    return EXIT_FAILED if lacking else EXIT_DONE


def _asked(trackers: Sequence[str], known: MonitoringConfig) -> MonitoringConfig:
    """``known`` with these trackers; raises :class:`RequestError` with what is wrong with them."""
    asked = known.model_copy(update={"trackers": list(trackers)})
    for _, wrong in asked.conflicts():
        raise RequestError(f"--to: {wrong}")
    return asked


def _with_project(known: MonitoringConfig, project: str) -> MonitoringConfig:
    from pydantic import ValidationError

    try:
        return MonitoringConfig.model_validate({**known.model_dump(), "project": project})
    except ValidationError as error:
        wanted = MonitoringConfig.model_fields["project"].description
        raise RequestError(f"--project {project!r} is not {wanted}") from error


def _not_owned(run: RunDirectory) -> Callable[[float], bool]:
    def over(seconds: float) -> bool:
        time.sleep(seconds)
        return not run.is_owned()

    return over
