"""The lanes of a step in blocks of characters: what every rank did, side by side in time.

Invariants: a column shows what took most of its time, a wait among it; of two that took as much, what came first. There are no
more lines than there is room for, and none where that is too little. Works that share a colour, or a letter where there are no
colours, are those that the legend calls other work.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.text import Text

from rlhf_ray.monitoring.spans.lanes import WORK, Piece
from rlhf_ray.monitoring.spans.records import DRIVER, role_of
from rlhf_ray.monitoring.spans.steps import Lanes, StepLanes, numbered, work_name
from rlhf_ray.monitoring.terminal.drawing import Pen, plain

COLOURS = ("cyan", "yellow", "green", "magenta", "blue", "red")
LETTERS = "ABCDEF"
NARROWEST, LONGEST_NAME, NOTE = 40, 18, 5
"""Columns of a terminal that shows lanes, of the name of one at most, and of the share that it worked."""
FEWEST = 2
"""Lanes that are worth a picture, where there are more."""


def lanes_view(shown: StepLanes, pen: Pen, room: int) -> list[Text]:
    """A line for the step, one for each lane and the legend, in at most ``room`` lines; nothing where they are too few."""
    names = numbered([shown.lanes], len(COLOURS))
    legend = _legend(names, pen)
    left = room - 1 - len(legend)
    if pen.width < NARROWEST or left < min(FEWEST + 1, len(shown.lanes)) or shown.step.end <= shown.step.begin:
        return []
    lanes = chosen(shown.lanes, left)
    name_width = min(max(map(len, lanes)), LONGEST_NAME)
    width = pen.width - name_width - 1 - NOTE
    lines = [Text.assemble(("step ", "dim"), f"{shown.step.number}, {shown.step.seconds:.3g} s, by rank")]
    for name in lanes:
        pieces = shown.lanes[name]
        works = columns(pieces, shown.step.begin, shown.step.end, width)
        numbers = [None if one is None else names.get(work_name(name, one), len(COLOURS) - 1) for one in works]
        bar = Text.assemble(*(_cell(number, pen, len(list(same))) for number, same in groupby(numbers)))
        worked = sum(piece.length for piece in pieces if piece.kind == WORK) / (shown.step.end - shown.step.begin)
        head = plain(name)
        head.truncate(name_width, pad=True)
        lines.append(Text.assemble(head, " ", bar, (f"{worked:>{NOTE}.0%}", "dim")))
    if len(lanes) < len(shown.lanes):
        lines.append(Text(f"and {len(shown.lanes) - len(lanes)} more", "dim"))
    return [*lines, *legend]


def columns(pieces: Sequence[Piece], begin: int, end: int, width: int) -> list[Piece | None]:
    """For each of ``width`` equal parts of the time the work that took most of it; None where that was a wait."""
    whole = end - begin
    lengths: list[dict[tuple[bool, str], int]] = [{} for _ in range(width)]
    found: dict[tuple[bool, str], Piece] = {}
    for piece in pieces:
        key = (piece.kind == WORK, piece.name if piece.kind == WORK else "")
        found.setdefault(key, piece)
        left, right = (max(piece.begin, begin) - begin) * width, (min(piece.end, end) - begin) * width
        for column in range(left // whole, min(-(-right // whole), width)):
            inside = min(right, (column + 1) * whole) - max(left, column * whole)
            lengths[column][key] = lengths[column].get(key, 0) + inside
    most = [max(own, key=lambda key: own[key]) if own else (False, "") for own in lengths]
    return [found[key] if key[0] else None for key in most]


def chosen(lanes: Lanes, room: int) -> list[str]:
    """The lanes that there is room for, in their order, the first of each role before others; a line is kept for the rest."""
    if len(lanes) <= room:
        return list(lanes)
    firsts = list({role_of(lane): lane for lane in reversed(list(lanes))}.values())
    wanted = sorted(lanes, key=lambda lane: (lane != DRIVER, lane not in firsts))[: max(room - 1, 1)]
    return [lane for lane in lanes if lane in wanted]


def _cell(number: int | None, pen: Pen, count: int = 1) -> Text:
    """So many columns of a work, or of a wait."""
    if number is None:
        return Text(count * ("." if pen.ascii_only else "·"), "dim")
    return Text(count * ("█" if pen.color and not pen.ascii_only else LETTERS[number]), COLOURS[number])


def _legend(names: dict[str, int], pen: Pen) -> list[Text]:
    """What the colours or letters stand for, in as many lines as that takes."""
    entries = [*((_cell(number, pen), name) for name, number in names.items()), (_cell(None, pen), "waits")]
    lines = [Text()]
    for cell, name in entries:
        entry = Text.assemble(cell, " ", plain(name))
        entry.truncate(pen.width)
        if lines[-1].cell_len and lines[-1].cell_len + 2 + entry.cell_len > pen.width:
            lines.append(Text())
        lines[-1] = Text.assemble(lines[-1], "  " if lines[-1].cell_len else "", entry)
    return lines
