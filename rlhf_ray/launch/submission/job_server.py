"""A Ray cluster's job server, asked so that every answer is a value or one of three typed errors.

Invariants: no call waits longer than its limit, also where a network drops packets; a server or a proxy that is away for a
moment raises :class:`ServerAway`, which is worth another try; what no other try mends is a :class:`RequestError` that names
the address, what was found there, and the way out; a job is sent under one id, so that sending it again never starts it twice.
"""

from __future__ import annotations

import os
import queue
import re
import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from rlhf_ray import environment
from rlhf_ray.console import get_logger
from rlhf_ray.errors import RequestError, RlhfRayError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient

T = TypeVar("T")
ADDRESS_VARIABLES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Ray's client prefers these to the address that it is given; here what was typed comes first."""
CALL_LIMIT_S = 60.0
PATIENCE_S = 30.0
"""How long a cluster that takes no jobs yet is asked again before it is an error."""
SECONDS_BETWEEN_TRIES = 1.0
_STATUS = re.compile(r"status code (\d{3})")
NO_AGENT = "No available agent"


class ServerAway(RlhfRayError):
    """The job server, or a proxy before it, gave no answer that means anything; a later call may."""


class JobUnknown(RlhfRayError):
    """The job server answers and knows no such job."""


class JobServer:
    """The job server at ``address``; making it waits until the server answers, up to ``patience_s``."""

    def __init__(self, address: str, *, patience_s: float = PATIENCE_S) -> None:
        self.address = checked_address(address)
        self._patience_s = patience_s
        environment.prepare()
        self._client: JobSubmissionClient = self._patiently(lambda: self._connect(self.address))

    def submit(self, job: str, **options: Any) -> None:
        """Submit a job under the id ``job``; ``options`` are those of Ray's ``submit_job``."""
        try:
            self._patiently(lambda: self._client.submit_job(submission_id=job, **options))
        except RequestError as error:
            if f"{job} already exists" not in str(error):  # an earlier try arrived, and its answer was lost
                raise

    def details(self, job: str) -> JobDetails:
        """What the cluster knows of a job; raises :class:`ServerAway` or :class:`JobUnknown`."""
        return self._call(lambda: self._client.get_job_info(job))

    def whole_log(self, job: str) -> str:
        """The log of a job as it is now; raises :class:`ServerAway` or :class:`JobUnknown`."""
        return self._call(lambda: self._client.get_job_logs(job))

    async def log(self, job: str) -> AsyncIterator[str]:
        """The log of a job from its first character on, as it grows; :class:`ServerAway` where the connection breaks."""
        try:
            async for text in self._client.tail_job_logs(job):
                yield text
        except Exception as error:  # whatever broke the connection, what the job does is asked for elsewhere
            raise ServerAway(f"{self.address}: {_first_line(error)}") from error

    def _connect(self, address: str) -> JobSubmissionClient:
        from ray.job_submission import JobSubmissionClient

        hidden = {name: os.environ.pop(name) for name in ADDRESS_VARIABLES if name in os.environ}
        try:
            return JobSubmissionClient(address)
        except ConnectionError as error:
            raise RequestError(
                f"no Ray cluster answers at {address} ({error}); start one (ray start --head), or name it with --address"
            ) from error
        finally:
            os.environ.update(hidden)

    def _patiently(self, work: Callable[[], T]) -> T:
        deadline, told = time.monotonic() + self._patience_s, False
        while True:
            try:
                return self._call(work)
            except ServerAway as error:
                if time.monotonic() >= deadline:
                    raise self._takes_no_jobs(error) from error
                if not told:
                    get_logger().info("%s; asking again for up to %g s", _first_line(error), self._patience_s)
                    told = True
            time.sleep(SECONDS_BETWEEN_TRIES)

    def _call(self, work: Callable[[], T]) -> T:
        """The result of ``work``, whose errors become typed ones; Ray's client knows no time limit of its own."""
        outcome: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()

        def run() -> None:
            try:
                outcome.put((work(), None))
            except BaseException as error:
                outcome.put((None, error))

        threading.Thread(target=run, daemon=True).start()
        try:
            result, error = outcome.get(timeout=CALL_LIMIT_S)
        except queue.Empty:
            raise ServerAway(f"{self.address} gave no answer within {CALL_LIMIT_S:g} s") from None
        if error is not None:
            raise self._typed(error) from error
        return result  # type: ignore[return-value]  # with no error it is a T, which may itself be None

    def _typed(self, error: BaseException) -> BaseException:
        """What an error of Ray's client, of requests or of aiohttp means; ours stay as they are."""
        from ray.exceptions import AuthenticationError

        if isinstance(error, RlhfRayError) or not isinstance(error, Exception):
            return error
        if isinstance(error, AuthenticationError):
            return RequestError(
                f"the Ray cluster at {self.address} asks for a token, and got none that it knows: set RAY_AUTH_MODE=token, and "
                "RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to the cluster's"
            )
        status = _STATUS.search(str(error))
        code = int(status[1]) if status is not None else getattr(getattr(error, "response", None), "status_code", None)
        if code == 404 and isinstance(error, RuntimeError) and "does not exist" in str(error):  # else a proxy says it
            return JobUnknown(f"{self.address}: {_first_line(error)}")
        if code is not None and 400 <= code < 500 and code not in (408, 425, 429):
            return RequestError(f"the server at {self.address} refuses the request: {_last_line(error)}")
        return ServerAway(f"{self.address}: {_first_line(error)}")

    def _takes_no_jobs(self, error: ServerAway) -> RequestError:
        if NO_AGENT in str(error):
            return RequestError(
                f"the Ray cluster at {self.address} takes no jobs ({NO_AGENT}): either it has just started, and takes them in "
                "a moment; or another Ray on its head's machine, such as a run that started Ray there, took port 52365 "
                "before it, and waiting does not help: start the cluster with ray start --head "
                "--dashboard-agent-listen-port=PORT, with a port that is free"
            )
        return RequestError(
            f"no job server answers at {_first_line(error)}: look whether the cluster's dashboard runs there "
            "(ray start --head), or name it with --address"
        )


def checked_address(address: str) -> str:
    """``address``, if it can be one of a job server; raises :class:`RequestError` with an example if not."""
    example = "give the address of the cluster's dashboard, such as http://127.0.0.1:8265"
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        has_port = parts.port is not None  # raises where the port is none
        known = parts.scheme in ("http", "https", "ray") or (not parts.scheme and has_port)
    except ValueError as error:
        raise RequestError(f"--address {address}: {error}; {example}") from error
    if address != "auto" and not (known and parts.hostname):
        raise RequestError(f"--address {address} is no address of a Ray cluster: {example}")
    return address


def _first_line(error: BaseException) -> str:
    return _lines(error)[0]


def _last_line(error: BaseException) -> str:
    """The last line of what may be a stack trace of the server's."""
    return _lines(error)[-1]


def _lines(error: BaseException) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
