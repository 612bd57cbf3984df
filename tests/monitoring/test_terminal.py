"""What a terminal shows of a run follows from its files and the width alone; no line is wider than the terminal, and no text of
a run moves its cursor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from rich.cells import cell_len

from rlhf_ray.monitoring.terminal.drawing import ASCII_LEVELS, LEVELS, Pen, squeezed
from rlhf_ray.monitoring.terminal.live import Phase, RunAlarm, RunState, live_view, log_lines
from rlhf_ray.monitoring.terminal.samples import compared_view, samples_view, token_view

HOSTILE = "\x1b[2J\x1b[31m[bold]red[/bold]\r\x07 \u202e 漢字 " + "x" * 300
WIDTHS = (40, 80, 200)
PENS = [Pen(width, color=color, ascii_only=ascii_only) for width in WIDTHS for color, ascii_only in
        ((False, False), (True, False), (False, True))]  # fmt: skip
ESCAPE = re.compile("\x1b\\[[0-9;]*m")


def step(number: int, **values: float | None) -> dict[str, Any]:
    times = {"time/step": 10.0, "time/rollout": 6.0, "time/update": 3.0, "time/weights": 0.01}
    return {"step": number, "timestamp": 1e9 + 10 * number, "reward/learned": number / 10, **times, **values}


STATE = RunState(
    "demo-ppo",
    "ppo",
    "running",
    lines=[
        *(step(number, **{"kl/k1": None if number == 3 else 0.5}) for number in range(1, 9)),
        {"step": 8, "timestamp": 1e9},
    ],
    total=40,
    age_s=4.0,
    took_s=3700.0,
    committed=6,
    phase=Phase("rollout", 12.0, 6.0),
    health=[("engine 0", "healthy, weights 8, 0 restarts"), ("engine 1", f"dead, no weights: {HOSTILE}")],
    alarms=[RunAlarm("EngineLost", "warning", "an engine died", "look at status")],
)
ROW: Mapping[str, Any] = {
    "prompt": HOSTILE,
    "response": HOSTILE,
    "score": 1.5,
    "finished": False,
    "left_out": 7,
    "tokens": {
        "text": ["\n", HOSTILE, " the"],
        "log_probs": [-0.25, -1.0, None],
        "rollout_log_probs": [-0.26, -1.0, None],
        "values": [0.5, 0.25, None],
        "token_rewards": [0.0, 1.5, None],
        "returns": [1.5, 1.5, None],
        "advantages": [1.0, -0.25, None],
    },
}


@pytest.mark.parametrize("pen", PENS, ids=str)
def test_no_line_is_wider_than_the_terminal_and_nothing_moves_its_cursor(pen: Pen) -> None:
    views = [
        live_view(STATE, pen),
        live_view(RunState(HOSTILE, HOSTILE, HOSTILE, facts={"to do": HOSTILE}), pen),
        samples_view([ROW, {**ROW, "response": "short"}, {**ROW, "prompt": "other"}], pen),
        compared_view(HOSTILE, [(HOSTILE, HOSTILE), ("ppo", "fine")], pen),
        token_view(ROW, pen),
        token_view({"prompt": HOSTILE, "response": "", "score": 0.0}, pen),
    ]
    for lines in views:
        text = "\n".join(lines)
        bare = ESCAPE.sub("", text) if pen.color else text
        assert all(cell_len(line) <= pen.width for line in bare.split("\n"))
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", bare)
        assert "31m[bold]red[/bold]" in bare.replace("\n", "") or lines in (views[0], views[-1])
        assert bare.isascii() or not pen.ascii_only
    assert (ESCAPE.search("\n".join(views[0])) is not None) is pen.color


def test_a_run_in_80_columns() -> None:
    shown = live_view(replace(STATE, health=STATE.health[:1]), Pen(80))
    assert shown[:4] == [
        "demo-ppo  ppo  running",
        "━" * 12 + "─" * 48,
        "step 8 of 40, 1 h 1 min so far, 5 min 16 s left, step 6 is committed",
        "now rollout for 12 s, usually 6 s",
    ], "32 steps at 10 s, of which 4 s are over"
    assert shown[4] == "warning EngineLost: an engine died. look at status"
    assert shown[5].split() == ["reward/learned", "0.8", "score", "▁▂▃▄▅▆▇█"]
    assert shown[6].split() == ["kl/k1", "0.5", "nats/sequence", LEVELS[0] * 7], "a value that is missing is no 0"
    assert shown[7:] == [
        "time of the last steps: rollout 60%, update 30%",
        "engine 0 healthy, weights 8, 0 restarts",
    ]


def test_a_narrow_terminal_shows_values_whole() -> None:
    lines = [step(1, **{"rollout/tokens_per_second": 123456.0, "length/response": 178.72})]
    shown = live_view(replace(STATE, lines=lines), Pen(40))
    assert any(re.fullmatch(r"rollout/tokens_per_second 1\.235e\+05", line) for line in shown), shown
    assert any(re.fullmatch(r"length/response +178\.7", line) for line in shown), shown


def test_time_left_is_what_the_run_says_or_follows_from_its_pace() -> None:
    assert replace(STATE, lines=[step(8, seconds_left=50.0)]).left_s == 46.0
    assert replace(STATE, total=None).left_s is None and replace(STATE, lines=()).left_s is None
    assert replace(STATE, age_s=1e6).left_s == 0.0


@pytest.mark.parametrize(("pen", "levels"), [(Pen(80), LEVELS), (Pen(80, ascii_only=True), ASCII_LEVELS)])
def test_a_curve_has_the_lowest_and_the_highest_level_and_means_of_neighbours(pen: Pen, levels: str) -> None:
    assert pen.spark([0.0, 7.0, 3.0], 8) == levels[0] + levels[7] + levels[3]
    assert pen.spark([5.0] * 4, 8) == levels[0] * 4 and pen.spark([1.0], 8) == "" and pen.spark([1.0, 2.0], 0) == ""
    values = [float(number % 7) for number in range(103)]
    parts = squeezed(values, 10)
    sizes = [103 * (number + 1) // 10 - 103 * number // 10 for number in range(10)]
    assert sum(part * size for part, size in zip(parts, sizes, strict=True)) == pytest.approx(sum(values))
    assert max(sizes) - min(sizes) <= 1 and len(parts) == 10


def test_a_log_gets_what_is_new_and_nothing_where_nothing_is() -> None:
    assert log_lines(STATE, STATE) == []
    assert log_lines(STATE, replace(STATE, age_s=9.0, phase=None)) == []
    first = log_lines(None, STATE)
    assert first[:2] == ["demo-ppo: running", "8/40  reward/learned 0.8  kl/k1 0.5  5 min 16 s left"]
    assert first[2].startswith("engine 1: dead, no weights: \\x1b[2J") and len(first) == 4, (
        "a healthy engine is not news"
    )
    assert first[3] == "warning EngineLost: an engine died. look at status"
    later = replace(
        STATE, lines=[*STATE.lines, step(9)], alarms=(), health=[("engine 1", "healthy, weights 9, 1 restarts")]
    )
    assert log_lines(STATE, later) == [
        "9/40  reward/learned 0.9  kl/k1 0.5  5 min 6 s left",
        "engine 1: healthy, weights 9, 1 restarts",
        "EngineLost has ended",
    ]
    assert log_lines(later, replace(later, state="finished")) == ["demo-ppo: finished"]


def test_answers_to_one_prompt_stand_side_by_side_where_there_is_room() -> None:
    rows = [{"prompt": "why?", "response": f"because {number}", "score": float(number)} for number in range(3)]
    wide, narrow = samples_view(rows, Pen(200)), samples_view(rows, Pen(40))
    assert wide[0] == narrow[0] == "why?"
    assert re.findall(r"\d: score \d", wide[1]) == [f"{number + 1}: score {number}" for number in range(3)]
    assert narrow[1:] == [part for n in range(3) for part in (f"{n + 1}: score {n}", f"because {n}")]


def test_each_token_has_its_numbers_and_one_that_was_not_sampled_has_none() -> None:
    row = {**ROW, "prompt": "why?", "tokens": {**ROW["tokens"], "text": ["\n", " so", " the"]}}
    shown = token_view(row, Pen(120))
    assert shown[:2] == ["why?", "score 1.5, cut off"]
    assert shown[2].split() == ["token", "log-prob", "rollout", "value", "reward", "return", "advantage"]
    assert shown[3].split() == ["1", "\\n", "-0.250", "-0.260", "0.500", "0.000", "1.500", "1.000"]
    assert shown[4].split() == ["2", "so", "-1.000", "-1.000", "0.250", "1.500", "1.500", "-0.250"]
    assert shown[5].split() == ["3", "the"] and shown[6] == "7 more tokens are not kept"
    narrow = token_view(row, Pen(46))
    assert narrow[2].split() == ["token", "log-prob", "reward", "advantage"], "the least telling numbers give way first"
    colored = token_view(row, Pen(120, color=True))
    assert "\x1b[1;32m" in colored[3] and "\x1b[31m" in colored[4], "bold where it mattered, red where it was worse"
