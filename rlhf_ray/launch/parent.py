"""The process that a user starts: it runs the driver in a process of its own and starts it again when it fails.

Invariants: it loads neither torch nor ray; signals reach the driver, and the exit code of the driver reaches the caller. A
driver that died or failed is started again from the last commit, as often as the config allows, unless it was asked to
stop; if it is not, the last sentence says how it ended, where its last commit is, and how to go on. A job that this machine
cannot hold is refused before any driver starts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
)
from rlhf_ray.planning.capacity import needed, offered_here, require_fit
from rlhf_ray.processes import lifeline
from rlhf_ray.processes.child import Ended, run_child
from rlhf_ray.runs.checkpoints import CheckpointStore
from rlhf_ray.runs.clusters import on_its_cluster
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.resuming import plan_continuation
from rlhf_ray.runs.trust import refuse_untrusted

FINAL_CODES = {EXIT_DONE, EXIT_WRONG_REQUEST, EXIT_NO_CAPACITY, EXIT_RESUMABLE}
DRIVER = "rlhf_ray.launch.driver"
DEMO = "rlhf_ray.launch.demo"


ON_STOP = "the run ends after the step that it is in, with a commit; before its first step, at once"


def start_run(config: Job, *, driver: str = DRIVER) -> int:
    """Run a driver for a new run; returns the exit code."""
    config = with_absolute_paths(config, Path.cwd())  # ranks on a running cluster have other working directories
    _require_room(config)
    text = dump_config(config)
    return _restart_until_final(
        run_driver(driver, [], text), run_directory(config), config.run.max_restarts, driver, text
    )


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
    _require_room(on_its_cluster(config, run))
    changed = [*overrides, *(word for key in accept for word in ("--accept", key))]
    ended = _run_resuming_driver(driver, directory, changed)
    return _restart_until_final(ended, directory, config.run.max_restarts, driver, dump_config(config), changed)


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
    ended: Ended, directory: Path, restarts: int, driver: str, text: str, changed: Sequence[str] = ()
) -> int:
    """Start another driver as long as the last one failed: from the last commit, or anew where no run was begun.

    ``changed`` is what a resumed run was to change: where it was changed already, it is no change any more.
    """
    try:
        for attempt in range(1, restarts + 1):
            if not _is_failure(ended) or ended.signal is not None:
                break
            get_logger().warning("the driver %s: restart %d of %d", ended.how, attempt, restarts)
            begun = (directory / CONFIG_NAME).is_file()
            ended = _run_resuming_driver(driver, directory, changed) if begun else run_driver(driver, [], text)
    except Interrupted as error:  # between two drivers
        if (directory / CONFIG_NAME).is_file():
            raise ResumableStop(f"{error}: {_way_on(directory)}") from error
        raise
    if _is_failure(ended):
        get_logger().error("the driver %s: %s", ended.how, _way_on(directory))
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


def _run_resuming_driver(driver: str, directory: Path, changed: Sequence[str] = ()) -> Ended:
    return run_driver(driver, ["--resume", str(directory), *changed])


def run_driver(module: str, arguments: Sequence[str], text: str = "") -> Ended:
    """Run one driver from start to end; ``text`` is its standard input. Signals to this process are passed on to it."""
    return run_child(["-m", module, *arguments], text=text, on_stop=ON_STOP)
