"""The token view of the report has the numbers of the terminal's, of the best, the middle and the worst sample, as text."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_ray.monitoring.report.page import RunReport, render_report
from rlhf_ray.monitoring.report.tokens import SHOWN_TOKENS, token_samples
from rlhf_ray.monitoring.terminal.drawing import Pen
from rlhf_ray.monitoring.terminal.samples import token_view
from rlhf_ray.monitoring.tokens import token_table

from .test_report import HOSTILE, Page


def sample(score: float, *texts: str, **other: Any) -> dict[str, Any]:
    count = len(texts)
    tokens = {
        "text": list(texts),
        "log_probs": [-0.5 * number for number in range(count)],
        "advantages": [1.0, -0.5, -0.6, 0.5, 0.0, None][:count],
    }
    return {"prompt": "why?", "response": "".join(texts), "score": score, "finished": True, "tokens": tokens, **other}


def test_a_token_has_its_numbers_and_stands_out_beyond_half_of_the_largest_advantage() -> None:
    table = token_table(sample(1.0, "a", "b", "c", "d", "e", "f", left_out=3))
    assert table is not None
    assert [row.tone for row in table.rows] == [2, -1, -2, 1, 0, 0]
    assert [row.numbers["advantages"] for row in table.rows] == ["1.000", "-0.500", "-0.600", "0.500", "0.000", ""]
    assert table.columns == ["log_probs", "advantages"] and table.left_out == "3 more tokens are not kept"
    assert token_table({"prompt": "p", "response": "r", "score": 1}) is None


def test_an_answer_without_a_token_is_shown() -> None:
    row = {**sample(0.0), "response": ""}
    assert token_view(row, Pen(80))[:2] == ["why?", "score 0, finished"]
    assert token_samples(1, [row]) == []


@pytest.mark.parametrize(
    ("scores", "numbers"),
    [
        ([1.0], [1]),
        ([1.0, 2.0], [2, 1]),
        ([0.0, 3.0, 1.0, 2.0, -1.0], [2, 3, 5]),
        ([1.0, 1.0, 1.0], [1, 2, 3]),
        ([], []),
    ],
)
def test_the_best_the_middle_and_the_worst_are_shown(scores: list[float], numbers: list[int]) -> None:
    bare = {"prompt": "p", "response": "r", "score": 9.0}
    shown = token_samples(7, [*(sample(score, "a") for score in scores), bare])
    assert [int(one.title.split()[1]) for one in shown] == numbers, "one without tokens is left out"
    assert all("of step 7" in one.title for one in shown)


def test_the_report_says_what_the_terminal_says(monkeypatch: pytest.MonkeyPatch) -> None:
    row = sample(0.25, "so", "\n", " it\tis", "\x1b[2J", left_out=2)
    (shown,) = token_samples(3, [row])
    lines = token_view(row, Pen(100))
    assert shown.title.endswith(lines[1]) and shown.notes[-1] == lines[-1]
    for line, cells in zip(lines[3:-1], shown.rows, strict=True):
        number, text, advantage, log_prob = cells
        assert line.split() == [*f"{number} {text} {log_prob} {advantage}".split()]
    assert [one.text for one in shown.tokens] == ["so", "↵\n", " it\tis", "\\x1b[2J"]
    assert [one.mark for one in shown.tokens] == ["up strong", "down", "down strong", "up"]
    html = render_report([RunReport("demo", [], samples=(3, [row]))])
    assert "Token by token" in html and all(cell in Page(html).text for cells in shown.rows for cell in cells)


def test_a_long_answer_is_cut_and_the_rest_is_counted() -> None:
    row = sample(1.0, *["x"] * 4)
    row["tokens"] = {"text": ["x"] * (SHOWN_TOKENS + 5), "log_probs": [0.0] * (SHOWN_TOKENS + 5)}
    (shown,) = token_samples(9, [row])
    assert len(shown.rows) == len(shown.tokens) == SHOWN_TOKENS
    assert shown.notes == ["5 more tokens: rlhf-ray samples RUN_DIR --step 9 --tokens 1 shows all that are kept"]


def test_texts_of_tokens_are_shown_and_never_run() -> None:
    row = sample(1.0, HOSTILE, "b", prompt=HOSTILE)
    html = render_report([RunReport("demo", [], samples=(1, [row]))])
    plain = render_report([RunReport("demo", [], samples=(1, [sample(1.0, "a", "b")]))])
    page = Page(html)
    assert "<script" not in html and page.text.count(HOSTILE) == 3
    assert sorted(page.tags) == sorted(Page(plain).tags)
    assert {name for name, _ in page.attributes} == {name for name, _ in Page(plain).attributes}
