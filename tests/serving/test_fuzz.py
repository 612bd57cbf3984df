"""Whatever is sent, the answer is a score or a documented refusal: the short form of the fuzzing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest

from . import fuzz, openapi_requests


def test_hostile_requests_get_scores_or_refusals_and_leave_nothing(tmp_path: Path) -> None:
    finding = fuzz.fuzz(fuzz.fuzzed_app(tmp_path), 600)
    assert not finding.problems, "\n".join(finding.problems[:10])
    assert finding.statuses[200] > 50, "requests that are all refused reach no model"
    expected = {
        "not_json",
        "too_deep",
        "too_many_items",
        "body_too_large",
        "compressed",
        "wrong_body",
        "unsupported",
        "item",
    }
    assert expected <= set(finding.kinds)


@pytest.mark.parametrize(
    ("status", "content", "problem"),
    [
        (500, b'{"error": "x", "kind": "server"}', "500 from /rm"),
        (200, b"NaN", "what is no JSON"),
        (422, b'{"error": "x", "kind": "not_json"}', "without a kind of its status"),
        (422, b'{"error": "fuzzed-secret", "kind": "item"}', "gives a text back"),
    ],
)
def test_a_bad_answer_is_noticed(status: int, content: bytes, problem: str) -> None:
    finding = fuzz.Finding()
    finding.look("/rm", b"{}", httpx.Response(status, content=content))
    assert problem in finding.problems[0]


REPORT: dict[str, Any] = {
    "failures": [], "errors": [], "complete": True, "stop_reason": "completed",
    "operations": {"tested": 19, "total": 19}, "test_cases": {"generated": 2000},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "exit_code", "problems"),
    [
        ({}, 0, []),
        ({"failures": [{"title": "Server error", "operations": ["POST /rm", "POST /score"]}]}, 0,
         ["Server error: POST /rm, POST /score"]),
        ({"errors": ["no schema"]}, 0, ["Schemathesis: no schema"]),
        ({"operations": {"tested": 18, "total": 19}}, 0, ["18 of 19 operations were asked: completed"]),
        ({"complete": False, "stop_reason": "interrupted"}, 0, ["19 of 19 operations were asked: interrupted"]),
        ({}, 1, ["what it said"]),
    ],
)  # fmt: skip
def test_whatever_schemathesis_finds_or_leaves_out_is_a_problem(
    changed: dict[str, Any], exit_code: int, problems: list[str]
) -> None:
    run = openapi_requests.read_report({**REPORT, **changed}, exit_code, "what it said")
    assert (run.requests, run.problems) == (2000, problems)


def test_connections_and_log_lines_are_noticed() -> None:
    import socket

    from rlhf_ray.console import get_logger

    with fuzz.watching_connections() as opened, fuzz.listening_to_log() as log:
        with pytest.raises(OSError), socket.socket() as probe:
            probe.settimeout(1)
            probe.connect(("127.0.0.1", 1))
        get_logger("serving").info("a line")
    assert len(opened) == 1 and "a line" in log.getvalue()
