"""A job is followed to its end whatever breaks on the way, and its log is shown once, whole and in order."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.errors import Interrupted, RequestError
from rlhf_ray.launch import submit
from rlhf_ray.launch.submission import following
from rlhf_ray.launch.submission.job_server import JobUnknown, ServerAway
from rlhf_ray.processes.interrupts import SIGNALS, interruptible

WHOLE = "".join(f"line {number}\n" for number in range(40))


class Status:
    """Ray's status of a job, as much of it as is read."""

    def __init__(self, value: str) -> None:
        self.value = value

    def is_terminal(self) -> bool:
        return self.value in ("SUCCEEDED", "FAILED", "STOPPED")


class Server:
    """A job server whose log connections end as ``connections`` says, one after the other: after so many characters, and how.

    The job has ended after the last of them. A log is always sent from its first character on, in pieces of ``piece``.
    ``away`` is for how many questions the server is away, before it answers any, and before it gives the whole log.
    """

    address = "http://head:8265"

    def __init__(self, *connections: tuple[int, str], away: int = 0, piece: int = 17) -> None:
        self.connections = list(connections)
        self.away = self.log_away = away
        self.piece = piece

    def details(self, job: str) -> Any:
        if self.away:
            self.away -= 1
            raise ServerAway("status code 502")
        status = Status("RUNNING" if self.connections else "SUCCEEDED")
        return SimpleNamespace(status=status, driver_exit_code=0, message="")

    def whole_log(self, job: str) -> str:
        if self.log_away:
            self.log_away -= 1
            raise ServerAway("status code 504")
        return WHOLE

    async def log(self, job: str) -> AsyncIterator[str]:
        length, how = self.connections.pop(0)
        for start in range(0, length, self.piece):
            yield WHOLE[start : min(start + self.piece, length)]
        if how == "breaks":
            raise ServerAway("WebSocket connection closed unexpectedly with close code 1006")
        if how == "hangs":
            await asyncio.sleep(60)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "SECONDS_BETWEEN_TRIES", (0.0,))
    monkeypatch.setattr(following, "SILENCE_S", 0.05)


def followed(server: Server) -> tuple[Any, str]:
    """How the job ended and what was shown; the test fails where the job is given up, or followed without end."""
    shown: list[str] = []
    job = following.follow(server, "job", following.Log(shown.append))
    try:
        details = asyncio.run(asyncio.wait_for(job, 20))
    except (ServerAway, TimeoutError) as error:
        pytest.fail(f"the job was not followed to its end: {error!r}")
    return details, "".join(shown)


@pytest.mark.parametrize("how", ["breaks", "ends", "hangs"])
@pytest.mark.parametrize("last", [20, 101, len(WHOLE)])
@pytest.mark.parametrize("piece", [1, 17, 1000])
def test_a_log_whose_connection_goes_is_shown_once_and_whole(how, last, piece):
    server = Server((100, how), (50, how), (0, how), (101, how), (last, how), piece=piece)
    details, shown = followed(server)
    assert server.connections == [] and details.status.value == "SUCCEEDED"
    assert shown == WHOLE


def test_a_quiet_log_is_sent_less_and_less_often(monkeypatch):
    """Each connection sends it from its beginning; one that had missed something is looked at soon again."""
    waited = []

    async def wait_for(line: Any, seconds: float) -> Any:
        waited.append(seconds)
        return await line

    monkeypatch.setattr(following.asyncio, "wait_for", wait_for)
    monkeypatch.setattr(following, "SILENCE_S", 60.0)
    quiet = [(30, "ends")] * 6
    asyncio.run(
        following.follow(Server(*quiet, (40, "ends"), (40, "ends"), piece=1000), "job", following.Log(lambda new: None))
    )
    assert waited[::2] == [60, 60, 120, 240, 480, 600, 600, 60]


def test_a_job_whose_log_stays_out_of_reach_still_ends_with_its_status(project_log):
    details, shown = followed(Server(*[(30, "breaks")] * 20, away=10**3))
    assert details.status.value == "SUCCEEDED" and shown == WHOLE[:30]
    assert "the end of the log of job cannot be read" in project_log.getvalue()


def test_a_server_that_is_away_for_a_while_is_asked_again(project_log):
    details, shown = followed(Server((30, "breaks"), away=4))
    assert details.status.value == "SUCCEEDED" and shown == WHOLE
    assert project_log.getvalue().count("status code 502") == 1


def test_a_refusal_meanwhile_is_none_of_the_job(project_log):
    """A proxy refuses for a moment, or for as long as a token was changed; the job goes on."""

    class Refusing(Server):
        def details(self, job: str) -> Any:
            if self.away:
                self.away -= 1
                raise RequestError("the server at http://head:8265 refuses the request: 404 default backend")
            return super().details(job)

    try:
        details, shown = followed(Refusing((30, "breaks"), away=4))
    except RequestError as error:
        pytest.fail(f"a job that runs was given up: {error}")
    assert details.status.value == "SUCCEEDED" and shown == WHOLE
    assert project_log.getvalue().count("404 default backend") == 1


def test_a_cluster_that_stays_away_is_not_said_to_have_failed_the_job(monkeypatch):
    monkeypatch.setattr(following, "AWAY_LIMIT_S", 0.0)
    server = Server((0, "ends"), away=10**9)
    with pytest.raises(ServerAway, match="job may still go on"):
        asyncio.run(following.follow(server, "job", following.Log(lambda text: None)))


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_client_that_is_stopped_says_that_the_job_goes_on_and_how_to_follow_and_stop_it(tmp_path, number, caplog):
    class Interrupting(Server):
        async def log(self, job: str) -> AsyncIterator[str]:
            signal.raise_signal(number)
            yield ""

    with pytest.raises(Interrupted) as caught, interruptible():
        submit.watch(Interrupting((0, "ends")), "raysubmit_1", tmp_path)
    assert caught.value.exit_code == 128 + number
    gc.collect()
    assert [record for record in caplog.records if record.name == "asyncio"] == [], "a stack trace is shown"
    for part in (
        "raysubmit_1 goes on",
        "ray job logs --follow --address http://head:8265 raysubmit_1",
        "ray job stop --address",
    ):
        assert part in str(caught.value)


def test_a_job_that_its_cluster_forgot_is_told_with_where_to_look(tmp_path, project_log):
    class Forgetful(Server):
        def details(self, job: str) -> Any:
            raise JobUnknown("http://head:8265: Request failed with status code 404: Job raysubmit_1 does not exist.")

    assert submit.watch(Forgetful(), "raysubmit_1", tmp_path) == 1
    assert f"rlhf-ray status {tmp_path}" in project_log.getvalue()


@pytest.mark.parametrize("piece", [1, 7, 1000])
def test_the_exit_code_that_a_job_writes_last_is_read_wherever_the_log_is_cut(piece):
    text = "about rlhf-ray: exit code 9\nrlhf-ray: exit code 3\nmore\nrlhf-ray: exit code 75\n"
    log = following.Log(lambda new: None)
    for start in range(0, len(text), piece):
        log.receive(text[start : start + piece])
    assert log.exit_code == 75


@pytest.mark.parametrize(
    ("status", "driver", "said", "commits", "code"),
    [
        ("SUCCEEDED", 0, None, [], 0),
        ("FAILED", 3, None, [], 3),
        ("FAILED", -9, None, [], 137),
        ("FAILED", None, None, [4], 1),
        ("FAILED", None, 2, [], 2),
        ("STOPPED", None, 75, [], 75),
        ("STOPPED", None, 143, [], 143),
        ("STOPPED", None, 1, [4], 1),
        ("STOPPED", None, None, [4], 75),
        ("STOPPED", None, None, [], 1),
    ],
)
def test_a_stopped_job_can_be_resumed_only_if_it_has_committed(tmp_path, status, driver, said, commits, code):
    for step in commits:
        (tmp_path / f"checkpoints/step-{step:06d}").mkdir(parents=True)
        (tmp_path / f"checkpoints/step-{step:06d}/manifest.json").touch()
    details = SimpleNamespace(status=Status(status), driver_exit_code=driver, message="Job was intentionally stopped.")
    assert submit._exit_code(details, "job", said, tmp_path) == code
