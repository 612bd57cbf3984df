"""``rlhf-ray submit``: run a job on a Ray cluster that is already running, through Ray's own job submission.

Invariants: the config is checked here before anything is sent; the resolved config is sent, so the cluster needs this package
but not the recipe; relative paths are taken from the current directory and must exist on the cluster under the same name; the
caller gets the driver's own exit code.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import tempfile
import time
from pathlib import Path
from typing import Any

from rlhf_ray import environment
from rlhf_ray.config.jobs.base import Job
from rlhf_ray.config.loading import dump_config
from rlhf_ray.config.paths import with_absolute_paths
from rlhf_ray.config.recipes import CONFIG_NAME
from rlhf_ray.console import get_logger, say
from rlhf_ray.errors import EXIT_DONE, EXIT_FAILED, EXIT_RESUMABLE, RequestError

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
SECONDS_TO_SETTLE = 10.0
STOP_WAIT, SECONDS_TO_COMMIT = "RAY_JOB_STOP_WAIT_TIME_S", "600"


def submit(config: Job, *, address: str | None, wait: bool) -> int:
    """Submit ``config``; with ``wait`` stream its log and return the driver's exit code."""
    config = config.to_train()
    client = _client(address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS)
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / CONFIG_NAME).write_text(dump_config(with_absolute_paths(config, Path.cwd())))
        job = client.submit_job(
            entrypoint=shlex.join(["python", "-m", "rlhf_ray", "train", config.kind, CONFIG_NAME]),
            runtime_env={"working_dir": directory, "env_vars": {"RAY_USAGE_STATS_ENABLED": "0", **_time_to_stop()}},
            metadata={"run": config.run.name, "kind": config.kind},
        )
    get_logger().info("submitted %s: run %s, %s", job, config.run.name, config.kind)
    if not wait:
        say(job)
        return EXIT_DONE
    try:
        asyncio.run(_follow(client, job))
    except KeyboardInterrupt:
        get_logger().warning(
            "%s goes on: `ray job logs --follow %s` shows it, `ray job stop %s` stops it", job, job, job
        )
        return EXIT_FAILED
    return _exit_code(client, job)


def _time_to_stop() -> dict[str, str]:
    """Ray kills a stopped job after three seconds, which is less than a step and its commit may take."""
    return {STOP_WAIT: os.environ.get(STOP_WAIT, SECONDS_TO_COMMIT)}


def _client(address: str) -> Any:
    environment.prepare()
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        raise RequestError(
            f"the Ray cluster at {address} asks for a token, and this is not the one it knows: set RAY_AUTH_MODE=token, and "
            "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's"
        ) from error
    except (ConnectionError, RuntimeError) as error:
        raise RequestError(
            f"no Ray cluster answers at {address} ({error}); start one (ray start --head), or name it with --address"
        ) from error


async def _follow(client: Any, job: str) -> None:
    async for lines in client.tail_job_logs(job):
        say(lines.rstrip("\n"))


def _exit_code(client: Any, job: str) -> int:
    """The driver's exit code; a stopped job is resumable, one without a code of its own failed."""
    deadline = time.monotonic() + SECONDS_TO_SETTLE
    while not (status := client.get_job_status(job)).is_terminal() and time.monotonic() < deadline:
        time.sleep(0.2)
    info = client.get_job_info(job)
    if status.value == "STOPPED":
        get_logger().warning("%s was stopped; its last commit is intact", job)
        return EXIT_RESUMABLE
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    get_logger().error("%s: %s", job, info.message)
    return EXIT_FAILED
