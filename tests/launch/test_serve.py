"""A service serves on where its address can be printed to nobody, and where a check of it is late."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.config.sections.run import RunConfig
from rlhf_ray.errors import DeadlineError, GroupError, RequestError
from rlhf_ray.launch import serve
from rlhf_ray.pending import Pending


class Full(io.StringIO):
    def write(self, _: str) -> int:
        raise OSError(28, "No space left on device")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [Full(), closed()], ids=["full", "closed"])
def test_an_address_that_nobody_takes_ends_no_service(
    stream: Any, monkeypatch: pytest.MonkeyPatch, project_log: io.StringIO
) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    assert outcome_of(lambda: serve._announce("http://127.0.0.1:1")) is None
    assert "standard output takes nothing" in project_log.getvalue()


def test_an_address_stands_alone_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    serve._announce("http://127.0.0.1:1")
    assert capsys.readouterr().out == "http://127.0.0.1:1\n"


def service_of(path: str) -> ServeConfig:
    role = ScoringRole(model=ModelConfig(path=path))
    return ServeConfig(kind="serve", run=RunConfig(name="test"), reward=role, port=0)


def outcome_of(call: Callable[[], Any]) -> Any:
    """What a call returns, or the error that it raises."""
    try:
        return call()
    except Exception as error:
        return error


def test_a_check_that_is_late_is_made_again_and_only_the_end_of_the_gateway_ends_the_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve, "SECONDS_BETWEEN_CHECKS", 0.0)
    died = GroupError("gateway", 0, "check", "its process died")
    config = service_of("model")
    reloaded = config.serving(config.name, ScoringRole(model=ModelConfig(path="newer")))
    answers: list[Any] = [config, DeadlineError("gateway", 0, "check", "late"), reloaded, died]

    class Gateway:
        def call(self, method: str, *_: Any, **__: Any) -> Pending[Any]:
            assert method == "alive"
            answer = answers.pop(0)
            if isinstance(answer, ServeConfig):
                return Pending.done([answer])

            def fail() -> Any:
                raise answer

            return Pending(fail)

    gateway: Any = Gateway()
    assert outcome_of(lambda: serve._watch(gateway, config)) == (reloaded, died) and not answers


def test_a_gateway_that_dies_is_followed_by_another_at_the_same_port_again_and_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A signal, here the last start's interrupt, is what ends it."""
    died = GroupError("gateway", 0, "check", "its process died")
    starts: list[Any] = [died, RequestError("a service named serve runs on this cluster already"), died, None]
    ports: list[int] = []
    paths: list[str | None] = []

    @contextmanager
    def gateway(config: ServeConfig, *, detach: bool) -> Iterator[tuple[Any, str]]:
        ports.append(config.port)
        paths.append(config.reward.model.path)
        start = starts.pop(0)
        if start is None:
            raise KeyboardInterrupt
        if isinstance(start, RequestError):
            raise start
        yield start, "http://127.0.0.1:4321"

    monkeypatch.setattr(serve, "_gateway", gateway)
    newer = ScoringRole(model=ModelConfig(path="newer"))
    monkeypatch.setattr(serve, "_watch", lambda error, config: (config.serving("reward", newer), error))
    freed: list[str] = []
    monkeypatch.setattr(serve, "free_places_of_the_dead", freed.append)
    monkeypatch.setattr(serve, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setattr(serve.Cluster, "__enter__", lambda self: self)
    monkeypatch.setattr(serve.Cluster, "__exit__", lambda *_: None)
    config = service_of("/model")
    assert outcome_of(lambda: serve.serve(config, detach=False)) == 0
    assert ports == [0, 4321, 4321, 4321] and not starts
    assert paths == ["/model", "newer", "newer", "newer"], "another gateway goes back to a model that was replaced"
    starts[:] = [died] + [RequestError("no room")] * serve.STARTS_IN_VAIN
    assert isinstance(outcome_of(lambda: serve.serve(config, detach=False)), RequestError), "a supervisor can do more"
    assert not starts
    assert freed[:3] == ["test"] * 3, "Ray keeps the places of a dead gateway, and the next one would find none"
