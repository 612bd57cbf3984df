"""``rlhf-ray submit``: run a job on a Ray cluster that is already running, through Ray's own job submission.

Invariants: the config is checked here before anything is sent; the resolved config is sent, so the cluster needs this package
but not the recipe; relative paths are taken from the current directory and must exist on the cluster under the same name; the
caller gets the driver's own exit code, and never one of a failure while the job runs.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.actors.connection import JOB_NAME
from rlhf_ray.config.jobs.base import Job
from rlhf_ray.config.loading import dump_config
from rlhf_ray.config.paths import run_directory, with_absolute_paths
from rlhf_ray.config.recipes import CONFIG_NAME
from rlhf_ray.console import get_logger, say
from rlhf_ray.environment import SAYS_EXIT_CODE, expand_home
from rlhf_ray.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE, SIGNALLED, Interrupted, RequestError
from rlhf_ray.launch.submission.following import Log, Server, follow
from rlhf_ray.launch.submission.job_server import ADDRESS_VARIABLES, JobServer, JobUnknown
from rlhf_ray.runs.directory import RunDirectory

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
STOP_WAIT, SECONDS_TO_COMMIT = "RAY_JOB_STOP_WAIT_TIME_S", "600"


def submit(config: Job, *, address: str | None, wait: bool) -> int:
    """Submit ``config``; with ``wait`` stream its log and return the driver's exit code."""
    config = with_absolute_paths(config.to_train(), Path.cwd())
    metadata = {"run": config.run.name, "kind": config.kind}
    words = ["train", config.kind, CONFIG_NAME]
    return _send(words, metadata, run_directory(config), address, wait, files={CONFIG_NAME: dump_config(config)})


def submit_resume(directory: str, changes: Sequence[str] = (), *, address: str | None, wait: bool) -> int:
    """Let the cluster resume the run in ``directory``, which it must see under the same name; the rest as in :func:`submit`.

    ``changes`` are the words that ``rlhf-ray resume`` takes besides.
    """
    run = expand_home(directory).absolute()
    if run.exists():
        RunDirectory.open(run)
    elif Path(directory).is_absolute():
        get_logger().info("this machine does not see %s: the cluster will say whether it is a run", run)
    else:
        raise RequestError(f"{directory} is not here: give --resume the whole path that the run has on the cluster")
    return _send(["resume", str(run), *changes], {"run": run.name, "kind": "resume"}, run, address, wait)


def _send(
    words: Sequence[str],
    metadata: dict[str, str],
    run: Path,
    address: str | None,
    wait: bool,
    files: Mapping[str, str] | None = None,
) -> int:
    """Submit the command ``words`` with ``files`` beside it; ``run`` is the directory of its run."""
    variables = {"RAY_USAGE_STATS_ENABLED": "0", SAYS_EXIT_CODE: "1", STOP_WAIT: _time_to_stop()}
    given = (address, *(os.environ.get(name) for name in ADDRESS_VARIABLES), DEFAULT_ADDRESS)
    server = JobServer(next(filter(None, given)))
    job = f"raysubmit_{secrets.token_hex(8)}"
    with tempfile.TemporaryDirectory() as directory:
        for name, text in (files or {}).items():
            (Path(directory) / name).write_text(text)
        try:
            server.submit(
                job,
                entrypoint=shlex.join(["python", "-m", "rlhf_ray", *words]),
                runtime_env={"working_dir": directory, "env_vars": variables},
                metadata={**metadata, JOB_NAME: metadata["run"]},
            )
        except Interrupted as error:
            raise error.saying(f"{job} may have been submitted: {_to_stop(server, job)}") from None
    get_logger().info("submitted %s: run %s, %s", job, metadata["run"], metadata["kind"])
    if not wait:
        say(job)
        return EXIT_DONE
    return watch(server, job, run)


def watch(server: Server, job: str, run: Path) -> int:
    """Follow a job to its end and return its exit code; ``run`` is its run directory, where this machine sees it."""
    log = Log(_write)
    try:
        details = asyncio.run(follow(server, job, log))
    except Interrupted as error:
        raise error.saying(
            f"{job} goes on: `ray job logs --follow --address {server.address} {job}` follows it again, {_to_stop(server, job)}"
        ) from None
    except JobUnknown as error:
        get_logger().error(
            "the cluster does not know %s any more, as after a new start of its head (%s); `rlhf-ray status %s` says how far "
            "the run came",
            job,
            error,
            run,
        )
        return EXIT_FAILED
    return _exit_code(details, job, log.exit_code, run)


def _to_stop(server: Server, job: str) -> str:
    return f"`ray job stop --address {server.address} {job}` stops it"


def _write(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()


def _time_to_stop() -> str:
    """How many seconds a stopped job has before Ray kills it: by default three, less than a step and its commit may take."""
    seconds = os.environ.get(STOP_WAIT, SECONDS_TO_COMMIT)
    if not (seconds.isascii() and seconds.isdigit() and int(seconds) > 0):
        raise RequestError(
            f"{STOP_WAIT}={seconds}: Ray reads it as a whole number of seconds, at least 1, and cannot stop a job otherwise: "
            f"set it to what a step and a checkpoint may take, such as {SECONDS_TO_COMMIT}, or unset it"
        )
    return seconds


def _exit_code(details: Any, job: str, said: int | None, run: Path) -> int:
    """The driver's exit code: what Ray knows, else what the job ``said`` last, else what lies in the run directory."""
    if details.status.value == "STOPPED":
        return _exit_code_of_stopped(job, said, run)
    if details.driver_exit_code is not None:
        code = int(details.driver_exit_code)
        return SIGNALLED - code if code < 0 else code
    if said is not None:
        return said
    get_logger().error("%s: %s", job, details.message)
    return EXIT_FAILED


def _exit_code_of_stopped(job: str, said: int | None, run: Path) -> int:
    """Ray keeps no exit code of a stopped job, and calls it stopped as well if it was killed before it could commit."""
    if said is not None:
        get_logger().warning("%s was stopped and ended with %d", job, said)
        return said
    steps = RunDirectory(run).checkpoints.steps()
    if steps:
        get_logger().warning(
            "%s was stopped, and killed before it had ended: its last commit is that of step %d; `rlhf-ray resume %s` goes on "
            "from there",
            job,
            steps[-1],
            run,
        )
        return EXIT_RESUMABLE
    get_logger().error(
        "%s was stopped, and killed before it said how it ended; no commit of it is to be seen here in %s", job, run
    )
    return EXIT_FAILED
