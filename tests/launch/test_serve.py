"""A service serves on where its address can be printed to nobody, and where a check of it is late."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from rlhf_ray.errors import DeadlineError, GroupError
from rlhf_ray.launch import serve
from rlhf_ray.pending import Pending


class Full(io.StringIO):
    def write(self, _: str) -> int:
        raise OSError(28, "No space left on device")


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stream", [None, Full(), closed()], ids=["none", "full", "closed"])
def test_an_address_that_nobody_takes_ends_no_service(
    stream: Any, monkeypatch: pytest.MonkeyPatch, project_log: io.StringIO
) -> None:
    monkeypatch.setattr(sys, "stdout", stream)
    assert error_of(lambda: serve._announce("http://127.0.0.1:1")) is None
    assert "standard output takes nothing" in project_log.getvalue()


def test_an_address_stands_alone_on_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    serve._announce("http://127.0.0.1:1")
    assert capsys.readouterr().out == "http://127.0.0.1:1\n"


def error_of(call: Any) -> BaseException | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def test_a_check_that_is_late_is_made_again_and_only_the_end_of_the_gateway_ends_the_service(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve, "SECONDS_BETWEEN_CHECKS", 0.0)
    died = GroupError("gateway", 0, "check", "its process died")
    answers: list[Exception | None] = [None, DeadlineError("gateway", 0, "check", "late"), None, died]

    class Gateway:
        def call(self, method: str, *_: Any, **__: Any) -> Pending[Any]:
            assert method == "check"
            answer = answers.pop(0)
            if answer is None:
                return Pending.done([None])

            def fail() -> Any:
                raise answer

            return Pending(fail)

    gateway: Any = Gateway()
    assert error_of(lambda: serve._watch(gateway)) is died and not answers
