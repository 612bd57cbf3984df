"""What a job server says, or what stands in its place, becomes a sentence and exit code 2, or is worth another try."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, TypeVar

import pytest

from rlhf_ray.config.loading import load_config
from rlhf_ray.errors import Interrupted, RequestError
from rlhf_ray.launch import submit
from rlhf_ray.launch.submission import job_server
from rlhf_ray.launch.submission.job_server import JobServer, JobUnknown, ServerAway, checked_address
from rlhf_ray.processes.interrupts import SIGNALS, interruptible

T = TypeVar("T")
VERSION = (200, '{"version": "4", "ray_version": "2.60.0", "ray_commit": "", "session_name": ""}')
JOB = '{"job_id": "x", "submission_id": "job"}'


class Answers:
    """What the server answers to a request of a method and path, a list each that is gone through; the last one stays."""

    def __init__(self) -> None:
        self.lists: dict[str, list[tuple[int, str]]] = {"GET /api/version": [VERSION]}
        self.asked: list[str] = []

    def take(self, request: str) -> tuple[int, str]:
        self.asked.append(request)
        answers = self.lists.get(request, [(404, "not here")])
        return answers.pop(0) if len(answers) > 1 else answers[0]


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def address(answers: Answers) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, text = answers.take(f"{self.command} {self.path}")
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        do_POST = do_PUT = do_GET

        def log_message(self, format: str, *arguments: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_server, "SECONDS_BETWEEN_TRIES", 0.01)
    for name in job_server.ADDRESS_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def refusal(work: Callable[[], Any]) -> str:
    """The message with which a request is refused."""
    try:
        work()
    except Exception as error:
        assert isinstance(error, RequestError), repr(error)
        return str(error)
    pytest.fail("it was not refused")


def accepted(work: Callable[[], T]) -> T:
    """What ``work`` returns; the test fails where it is refused."""
    try:
        return work()
    except Exception as error:
        pytest.fail(repr(error))


@pytest.mark.parametrize(
    "address", ["foo", "http://[::1", "http://", "http://h:port", "h:99999", "ftp://h:1", "", ":1", "http:/h:1"]
)
def test_an_address_that_is_none_is_refused_with_an_example(address):
    message = refusal(lambda: JobServer(address))
    assert f"--address {address}" in message and "http://127.0.0.1:8265" in message


@pytest.mark.parametrize(
    "address", ["http://h", "https://h:1/prefix", "ray://h:10001", "h:6379", "auto", "http://[::1]:8265"]
)
def test_every_address_that_ray_takes_is_taken(address):
    assert checked_address(address) == address


def test_an_address_where_nothing_listens_is_refused_at_once():
    assert "no Ray cluster answers at http://127.0.0.1:9" in refusal(lambda: JobServer("http://127.0.0.1:9"))


@pytest.mark.parametrize("status", [401, 403])
def test_a_missing_or_wrong_token_names_what_to_set(address, answers, status):
    text = {401: "Unauthorized: Missing authentication token", 403: "Forbidden: Invalid authentication token"}[status]
    answers.lists["GET /api/version"] = [(status, text)]
    assert "RAY_AUTH_TOKEN" in refusal(lambda: JobServer(address))


def test_what_is_no_ray_at_all_is_refused(address, answers):
    answers.lists["GET /api/version"] = [(200, "<html>hello</html>")]
    assert address in refusal(lambda: JobServer(address, patience_s=0.05))


def test_a_proxy_that_is_away_for_a_moment_is_waited_for(address, answers):
    answers.lists["GET /api/version"] = [(502, "bad gateway"), (504, "late"), VERSION]
    assert accepted(lambda: JobServer(address)).address == address


@pytest.mark.parametrize("status", [500, 502, 503, 504, 429])
def test_a_proxy_that_stays_away_is_refused_with_what_it_says(address, answers, status):
    answers.lists["GET /api/version"] = [(status, "no")]
    assert str(status) in refusal(lambda: JobServer(address, patience_s=0.05))


def test_a_cluster_that_has_just_started_is_waited_for_and_gets_the_job_once(address, answers):
    no_agent = (500, "No available agent to submit job, please try again later.")
    answers.lists["POST /api/jobs/"] = [no_agent, no_agent, (200, JOB)]
    accepted(lambda: JobServer(address).submit("job", entrypoint="true"))
    assert answers.asked.count("POST /api/jobs/") == 3


def test_a_cluster_that_takes_no_jobs_is_refused_with_cause_and_way_out(address, answers):
    answers.lists["POST /api/jobs/"] = [(500, "No available agent to submit job, please try again later.")]
    server = JobServer(address, patience_s=0.05)
    message = refusal(lambda: server.submit("job", entrypoint="true"))
    assert "52365" in message and "--dashboard-agent-listen-port" in message


def test_a_job_whose_answer_was_lost_is_not_sent_as_another_one(address, answers):
    trace = (
        "Traceback ...\nValueError: Job with submission_id job already exists. Please use a different submission_id."
    )
    answers.lists["POST /api/jobs/"] = [(504, "late"), (400, trace)]
    accepted(lambda: JobServer(address).submit("job", entrypoint="true"))


def test_a_job_that_the_cluster_refuses_is_refused_with_its_reason(address, answers):
    answers.lists["POST /api/jobs/"] = [(400, "Traceback ...\nValueError: entrypoint_num_cpus must be positive")]
    server = JobServer(address)
    message = refusal(lambda: server.submit("job", entrypoint="true"))
    assert message.endswith("ValueError: entrypoint_num_cpus must be positive.") and "Traceback" not in message


def test_a_job_that_a_cluster_forgot_is_told_from_a_cluster_that_is_away(address, answers):
    server = JobServer(address)
    answers.lists["GET /api/jobs/job"] = [(404, "Job job does not exist"), (502, "bad gateway")]
    with pytest.raises(JobUnknown):
        server.details("job")
    with pytest.raises(ServerAway):
        server.details("job")


def test_a_proxy_that_finds_no_cluster_is_not_a_cluster_that_forgot_a_job(address, answers):
    server = JobServer(address)
    answers.lists["GET /api/jobs/job"] = [(404, "default backend - 404")]
    assert "default backend" in refusal(lambda: server.details("job"))


def test_a_server_that_never_answers_is_away(address, answers, monkeypatch):
    server = JobServer(address)
    monkeypatch.setattr(job_server, "CALL_LIMIT_S", 0.05)
    monkeypatch.setattr(server._client, "get_job_info", lambda job: threading.Event().wait(5))
    with pytest.raises(ServerAway, match="no answer within"):
        server.details("job")


def test_the_address_that_was_typed_comes_before_the_environment(address, monkeypatch):
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    assert accepted(lambda: JobServer(address)).address == address


@pytest.mark.parametrize(
    ("typed", "variables", "asked"),
    [
        ("http://a:1", {"RAY_API_SERVER_ADDRESS": "http://b:1", "RAY_ADDRESS": "http://c:1"}, "http://a:1"),
        (None, {"RAY_API_SERVER_ADDRESS": "http://b:1", "RAY_ADDRESS": "http://c:1"}, "http://b:1"),
        (None, {"RAY_ADDRESS": "http://c:1"}, "http://c:1"),
        (None, {}, "http://127.0.0.1:8265"),
    ],
)
def test_an_address_is_taken_from_where_it_is_given_first(monkeypatch, typed, variables, asked):
    seen = []
    monkeypatch.setattr(JobServer, "_connect", lambda server, address: seen.append(address))
    monkeypatch.setattr(JobServer, "submit", lambda server, job, **options: None)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    submit.submit(load_config("demo-sft", ["run.name=small"]), address=typed, wait=False)
    assert seen == [asked]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_client_that_is_stopped_while_it_submits_says_that_the_job_may_have_started(monkeypatch, number):
    monkeypatch.setattr(JobServer, "_connect", lambda server, address: None)
    monkeypatch.setattr(JobServer, "submit", lambda server, job, **options: signal.raise_signal(number))
    with pytest.raises(Interrupted, match=r"raysubmit_.* may have been submitted: `ray job stop"), interruptible():
        submit.submit(load_config("demo-sft", ["run.name=small"]), address="http://a:1", wait=True)


@pytest.mark.parametrize("value", ["2.5", "", "-1", "0", "ten", "1e3", "٣"])
def test_a_time_to_stop_that_ray_cannot_read_is_refused_before_anything_is_sent(monkeypatch, value):
    monkeypatch.setenv(submit.STOP_WAIT, value)
    config = load_config("demo-sft", ["run.name=small"])
    message = refusal(lambda: submit.submit(config, address="http://127.0.0.1:9", wait=True))
    assert f"{submit.STOP_WAIT}={value}" in message and "600" in message
