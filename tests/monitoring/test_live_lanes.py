"""A column of a lane shows what took most of its time; lanes take no more room than there is, and none from all else."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from itertools import pairwise

import pytest
from rich.cells import cell_len

from rlhf_ray.monitoring.spans.lanes import WAIT, WORK, Piece
from rlhf_ray.monitoring.spans.records import Step
from rlhf_ray.monitoring.spans.steps import StepLanes
from rlhf_ray.monitoring.terminal.drawing import Pen
from rlhf_ray.monitoring.terminal.lanes import chosen, columns, lanes_view
from rlhf_ray.monitoring.terminal.live import live_view

from .test_terminal import ESCAPE, PENS, STATE


def pieces(draw: random.Random, begin: int, end: int) -> list[Piece]:
    cuts = sorted({begin, end, *(draw.randrange(begin, end) for _ in range(draw.randrange(12)))})
    return [Piece(left, right, draw.choice([WORK, WAIT]), draw.choice("ab")) for left, right in pairwise(cuts)]


@pytest.mark.parametrize("seed", range(40))
def test_a_column_shows_what_a_count_of_every_moment_says(seed: int) -> None:
    draw = random.Random(seed)
    begin, width = draw.randrange(50), draw.randrange(1, 12)
    end = begin + width * draw.randrange(1, 9)
    own = pieces(draw, begin, end)
    shown = columns(own, begin, end, width)
    part = (end - begin) // width
    for number, column in enumerate(shown):
        counts: dict[str, int] = {}
        for moment in range(begin + number * part, begin + (number + 1) * part):
            (piece,) = [one for one in own if one.begin <= moment < one.end]
            key = piece.name if piece.kind == WORK else ""
            counts[key] = counts.get(key, 0) + 1
        most = max(counts, key=lambda key: counts[key])  # of equals the first
        assert ("" if column is None else column.name) == most, (own, number)
    assert len(shown) == width


LANES = StepLanes(
    Step(7, 0, 10_000_000),
    {
        "driver": [Piece(0, 1_000_000, WORK, "rollout"), Piece(1_000_000, 10_000_000, WAIT, "policy.apply")],
        "policy/0": [Piece(0, 5_000_000, WAIT, "driver"), Piece(5_000_000, 10_000_000, WORK, "apply")],
        "policy/1": [Piece(0, 8_000_000, WAIT, "driver"), Piece(8_000_000, 10_000_000, WORK, "apply")],
        "rollout/0": [Piece(0, 4_000_000, WORK, "generate"), Piece(4_000_000, 10_000_000, WAIT, "policy.apply")],
    },
)


def text(pen: Pen, room: int = 20) -> list[str]:
    return pen.lines(*lanes_view(LANES, pen, room))


def test_lanes_of_a_step_without_colours_are_letters_and_the_legend_names_them() -> None:
    shown = text(Pen(55, ascii_only=True))
    assert shown == [
        "step 7, 10 s, by rank",
        "driver    " + "C" * 4 + "." * 36 + "  10%",
        "policy/0  " + "." * 20 + "A" * 20 + "  50%",
        "policy/1  " + "." * 32 + "A" * 8 + "  20%",
        "rollout/0 " + "B" * 16 + "." * 24 + "  40%",
        "A policy.apply  B rollout.generate  C driver  . waits",
    ]
    assert text(Pen(55)) == [line.replace(".", "·") if "/" in line or line.startswith("driver") else line
                             for line in shown[:-1]] + [shown[-1].replace(". waits", "· waits")]  # fmt: skip


def test_colours_tell_works_apart_where_there_are_colours() -> None:
    shown = text(Pen(55, color=True))
    assert ESCAPE.sub("", shown[2]) == "policy/0  " + "·" * 20 + "█" * 20 + "  50%"
    codes = [re.findall("\x1b\\[(3\\dm)█+", line) for line in shown[1:5]]
    assert codes == [["32m"], ["36m"], ["36m"], ["33m"]], "one colour a work, the same in all lanes"


@pytest.mark.parametrize("pen", PENS, ids=str)
@pytest.mark.parametrize("room", range(12))
def test_lanes_take_no_more_room_than_there_is(pen: Pen, room: int) -> None:
    shown = text(pen, room)
    bare = [ESCAPE.sub("", line) for line in shown]
    assert len(shown) <= room and all(cell_len(line) <= pen.width for line in bare)
    assert not shown or len([line for line in bare if line.startswith(("driver ", "policy/", "rollout/"))]) >= 2
    of_the_legend = len(text(pen)) - 1 - len(LANES.lanes)
    assert bool(shown) is (room >= 1 + 3 + of_the_legend), "the step, two lanes and what is left out, and the legend"


def test_where_there_is_no_room_for_all_the_first_rank_of_each_role_stays() -> None:
    assert chosen(LANES.lanes, 4) == list(LANES.lanes)
    lanes = {**LANES.lanes, "rollout/1": LANES.lanes["rollout/0"]}
    assert chosen(lanes, 4) == ["driver", "policy/0", "rollout/0"] and chosen(lanes, 3) == ["driver", "policy/0"]
    shown = Pen(60).lines(*lanes_view(StepLanes(LANES.step, lanes), Pen(60), 6))
    assert [line.split()[0] for line in shown] == ["step", "driver", "policy/0", "rollout/0", "and", "A"]
    assert shown[4] == "and 2 more"


def test_a_picture_has_lanes_below_all_else_and_not_where_the_terminal_is_low() -> None:
    pen, state = Pen(80), replace(STATE, lanes=LANES)
    without = live_view(STATE, pen)
    assert live_view(state, pen)[: len(without)] == without and "step 7, 10 s, by rank" in live_view(state, pen)
    for height in range(len(without), len(without) + 12):
        shown = live_view(state, pen, height)
        assert shown[: len(without)] == without and len(shown) <= height
    assert live_view(state, pen, len(without)) == without
    assert live_view(replace(STATE, lanes=replace(LANES, step=Step(1, 5, 5))), pen) == without, "a step of no time"
