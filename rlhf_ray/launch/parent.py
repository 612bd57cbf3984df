"""The process that a user starts: it runs the driver in a process of its own and starts it again when it fails.

Invariants: it loads neither torch nor ray; signals reach the driver, and the exit code of the driver reaches the caller. A
driver that died or failed is started again from the last commit, as often as the config allows, unless it was asked to
stop; if it is not, the last sentence says how it ended, where its last commit is, and how to go on. One that gives no sign of
life is killed, and its stacks are kept, as far as it can say them. A job that this machine cannot hold is refused before any
driver starts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rlhf_ray.config.jobs.base import Job
from rlhf_ray.config.loading import dump_config
from rlhf_ray.config.paths import run_directory, with_absolute_paths
from rlhf_ray.config.recipes import CONFIG_NAME
from rlhf_ray.console import get_logger
from rlhf_ray.errors import (
    EXIT_DONE,
    EXIT_FAILED,
    EXIT_NO_CAPACITY,
    EXIT_RESUMABLE,
    EXIT_WRONG_REQUEST,
    Interrupted,
    ResumableStop,
    StorageError,
)
from rlhf_ray.planning.capacity import needed, offered_here, require_fit
from rlhf_ray.processes import lifeline
from rlhf_ray.processes.child import Ended, run_child
from rlhf_ray.runs.checkpoints import CheckpointStore
from rlhf_ray.runs.clusters import on_its_cluster
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.incidents import Action, Incident
from rlhf_ray.runs.resuming import naming_fewer_ranks, plan_continuation
from rlhf_ray.runs.trust import refuse_untrusted
from rlhf_ray.trainers.watchdog import write_stacks

FINAL_CODES = {EXIT_DONE, EXIT_WRONG_REQUEST, EXIT_NO_CAPACITY, EXIT_RESUMABLE}
DRIVER = "rlhf_ray.launch.driver"
DEMO = "rlhf_ray.launch.demo"
SILENT_PER_FLOOR = 1.5
"""How long a driver may give no sign of life, in ``run.stall_floor_s``."""
SILENT_BEATS = 5
"""How many signs of life it may miss at least, however small the floor is."""


ON_STOP = "the run ends after the step that it is in, with a commit; before its first step, at once"


@dataclass(frozen=True)
class Watch:
    """How the driver of the run in a directory is watched for signs of life."""

    directory: Path
    stall_floor_s: float = 60.0

    @property
    def silent_s(self) -> float:
        """How long it may give none; its own watchdog comes before."""
        return max(SILENT_PER_FLOOR * self.stall_floor_s, SILENT_BEATS * lifeline.BEAT_EVERY_S)

    def keep_stacks(self, pids: Sequence[int]) -> str:
        """Keep what processes do, where there is a run; the path of the file, or nothing."""
        if not (self.directory / CONFIG_NAME).is_file():
            return ""
        run = RunDirectory(self.directory)
        title = f"the driver gave no sign of life for {self.silent_s:g} s"
        return str(write_stacks(run, self._last_step(run), "driver", pids, title))

    def note(self, ended: Ended, action: Action) -> None:
        """Keep it as an incident of the run if the driver was killed because it gave no sign of life."""
        if not ended.silence or not (self.directory / CONFIG_NAME).is_file():
            return
        run = RunDirectory(self.directory)
        step, back = self._last_step(run), max(run.checkpoints.steps(), default=0)
        lost = max(step - back, 0)
        cause = f"the driver {ended.silence}"
        try:
            run.incidents.add(
                Incident(
                    time.time(), step, "driver", "driver", None, "stalled", cause, action, back, lost, self.silent_s
                )
            )
        except StorageError as error:
            get_logger().warning("the incident could not be kept: %s", error)

    def _last_step(self, run: RunDirectory) -> int:
        return max((int(line["step"]) for line in run.metrics.read()), default=0)


def start_run(config: Job, *, driver: str = DRIVER) -> int:
    """Run a driver for a new run; returns the exit code."""
    config = with_absolute_paths(config, Path.cwd())  # ranks on a running cluster have other working directories
    _require_room(config)
    text, directory = dump_config(config), run_directory(config)
    watch = Watch(directory, config.run.stall_floor_s)
    return _restart_until_final(run_driver(driver, [], text, watch), watch, config.run.max_restarts, driver, text)


def resume_run(
    directory: str | Path, overrides: Sequence[str] = (), accept: Sequence[str] = (), *, driver: str = DRIVER
) -> int:
    """Run a driver that resumes the run in ``directory`` from its last commit; returns the exit code.

    ``overrides`` change its config, as far as a run may change (:mod:`rlhf_ray.runs.changes`); ``accept`` names inputs that
    may have changed on disk. A run that has finished stays as it is, unless it becomes longer.
    """
    refuse_untrusted(directory)
    run = RunDirectory.open(directory)
    continuation = plan_continuation(run, overrides, files=bool(overrides))
    if continuation is None:
        return EXIT_DONE
    directory, config = run.path.absolute(), continuation.config
    with naming_fewer_ranks(config, run):
        _require_room(on_its_cluster(config, run))
    changed = [*overrides, *(word for key in accept for word in ("--accept", key))]
    watch = Watch(directory, config.run.stall_floor_s)
    ended = _run_resuming_driver(driver, watch, changed)
    return _restart_until_final(ended, watch, config.run.max_restarts, driver, dump_config(config), changed)


def start_demo(root: str, seed: int, overrides: Sequence[str]) -> int:
    """Run the demo's three jobs in one driver."""
    root = str(Path(root).absolute())
    ended = run_driver(DEMO, ["--root", root, "--seed", str(seed), *overrides])
    if _is_failure(ended):
        get_logger().error(
            "the demo's driver %s: `rlhf-ray status` says of each run in %s how far it is and how to go on with it",
            ended.how,
            root,
        )
    return exit_code(ended, Path(root))


def with_own_ray(config: Job, arguments: Sequence[str], work: Callable[[], int]) -> int:
    """Do the ``work`` of the command with these arguments; returns its exit code.

    Where it starts Ray on this machine, the same command does it again as a child with a session of its own: a signal to
    the whole process group would else end that Ray before the work could be ended in order.
    """
    if lifeline.is_child() or offered_here(config.cluster) is None:
        return work()
    ended = run_child(["-m", "rlhf_ray", *arguments], on_stop="the command stops, and what it has written is kept")
    if ended.code >= 0:
        return ended.code
    get_logger().error("the process that did the work %s", ended.how)
    return EXIT_FAILED if ended.signal is None else _code_of_signal(ended)


def _require_room(config: Job) -> None:
    """Refuse a job that this machine cannot hold if Ray starts here; the driver asks a running cluster itself."""
    offered = offered_here(config.cluster)
    if offered is not None:
        require_fit(needed(config), offered)


def _restart_until_final(
    ended: Ended, watch: Watch, restarts: int, driver: str, text: str, changed: Sequence[str] = ()
) -> int:
    """Start another driver as long as the last one failed: from the last commit, or anew where no run was begun.

    ``changed`` is what a resumed run was to change: where it was changed already, it is no change any more.
    """
    directory = watch.directory
    try:
        for attempt in range(1, restarts + 1):
            if not _is_failure(ended) or ended.signal is not None:
                break
            get_logger().warning("the driver %s: restart %d of %d", ended.how, attempt, restarts)
            watch.note(ended, "restarted")
            begun = (directory / CONFIG_NAME).is_file()
            ended = _run_resuming_driver(driver, watch, changed) if begun else run_driver(driver, [], text, watch)
    except Interrupted as error:  # between two drivers
        if (directory / CONFIG_NAME).is_file():
            raise ResumableStop(f"{error}: {_way_on(directory)}") from error
        raise
    if _is_failure(ended):
        watch.note(ended, "stopped")
        get_logger().error("the driver %s: %s", ended.how, _way_on(directory))
    elif ended.code not in FINAL_CODES and (directory / CONFIG_NAME).is_file():
        get_logger().info("stopped on request: %s", _way_on(directory))
    return exit_code(ended, directory)


def _is_failure(ended: Ended) -> bool:
    """Whether a driver died or failed; one that was asked to stop before it had begun anything has not."""
    return ended.code not in FINAL_CODES and ended.code != _code_of_signal(ended)


def exit_code(ended: Ended, directory: Path) -> int:
    """The exit code for the caller: a driver that was killed by the request to stop can be resumed from its last commit."""
    if ended.code in FINAL_CODES:
        return ended.code
    if ended.signal is None or (ended.code >= 0 and _is_failure(ended)):
        return EXIT_FAILED
    return EXIT_RESUMABLE if (directory / CONFIG_NAME).is_file() else _code_of_signal(ended)


def _code_of_signal(ended: Ended) -> int:
    """The exit code of a process that the signal stopped before it had begun anything; 0 where there was no signal."""
    return 0 if ended.signal is None else Interrupted(ended.signal).exit_code


def _way_on(directory: Path) -> str:
    """What is left of a run whose driver failed, and the command that goes on with it."""
    if not (directory / CONFIG_NAME).is_file():
        return "no run was begun"
    steps = CheckpointStore(directory / "checkpoints").steps()
    commit = f"the last commit is that of step {steps[-1]}" if steps else "nothing was committed yet"
    return f"{commit}; go on with: rlhf-ray resume {directory}"


def _run_resuming_driver(driver: str, watch: Watch, changed: Sequence[str] = ()) -> Ended:
    return run_driver(driver, ["--resume", str(watch.directory), *changed], "", watch)


def run_driver(module: str, arguments: Sequence[str], text: str = "", watch: Watch | None = None) -> Ended:
    """Run one driver from start to end; ``text`` is its standard input. Signals to this process are passed on to it."""
    words = ["-m", module, *arguments]
    if watch is None:
        return run_child(words, text=text, on_stop=ON_STOP)
    return run_child(words, text=text, on_stop=ON_STOP, silent_s=watch.silent_s, keep_stacks=watch.keep_stacks)
