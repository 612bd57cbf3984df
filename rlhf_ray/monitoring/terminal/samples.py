"""The samples of a step, answers to one prompt side by side, and one sample token by token.

Invariants: every text is shown whole, as text. A number that was not kept is left out and never shown as 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rlhf_ray.monitoring.terminal.drawing import Pen, on_one_line, plain, short

NARROWEST = 30
"""Columns of an answer that stands beside another one."""
TOKEN_COLUMNS: Mapping[str, str] = {
    "log_probs": "log-prob",
    "rollout_log_probs": "rollout",
    "reference_log_probs": "reference",
    "values": "value",
    "token_rewards": "reward",
    "returns": "return",
    "advantages": "advantage",
}
"""What is kept of each token, and its heading; the columns of a batch (``trajectories/columns.py``)."""
LEAST_TEXT = 12
"""Columns of a token's text, before numbers are left out of a narrow table."""
SampleRow = Mapping[str, Any]


def samples_view(rows: Sequence[SampleRow], pen: Pen) -> list[str]:
    """All samples of a step; those with the same prompt stand side by side, as many as there is room for."""
    groups: dict[str, list[tuple[int, SampleRow]]] = {}
    for number, row in enumerate(rows, 1):
        groups.setdefault(str(row["prompt"]), []).append((number, row))
    views: list[RenderableType] = []
    abreast = max((pen.width + 2) // (NARROWEST + 2), 1)
    for prompt, answers in groups.items():
        views += [Text(), plain(prompt, "bold")]
        for first in range(0, len(answers), abreast):
            views.append(_side_by_side([_answer(number, row) for number, row in answers[first : first + abreast]]))
    return pen.lines(*views[1:])


def compared_view(prompt: str, answers: Sequence[tuple[str, str]], pen: Pen) -> list[str]:
    """A prompt and the answers of several policies to it, each under its heading, side by side where there is room."""
    abreast = max((pen.width + 2) // (NARROWEST + 2), 1)
    cells = [Text.assemble(plain(heading, "cyan"), "\n", plain(text)) for heading, text in answers]
    rows = [_side_by_side(cells[first : first + abreast]) for first in range(0, len(cells), abreast)]
    return pen.lines(plain(prompt, "bold"), *rows)


def _side_by_side(cells: Sequence[Text]) -> Table:
    grid = Table.grid(padding=(0, 2), expand=True)
    for _ in cells:
        grid.add_column(ratio=1, overflow="fold")
    grid.add_row(*cells)
    return grid


def _answer(number: int, row: SampleRow) -> Text:
    about = f"{number}: score {short(row['score'])}" + ("" if row.get("finished", True) else ", cut off")
    return Text.assemble((about, "cyan"), "\n", plain(str(row["response"])))


def token_view(row: SampleRow, pen: Pen) -> list[str]:
    """One sample as a table with a row for each token of the answer; where a terminal is narrow, with fewer numbers."""
    kept = row.get("tokens")
    if not kept:
        return pen.lines(Text("nothing is kept of the tokens of this sample"))
    names = [name for name in TOKEN_COLUMNS if name in kept]
    number_width = len(str(len(kept["text"])))
    widths = {name: max(len(TOKEN_COLUMNS[name]), *(len(_number(value)) for value in kept[name])) for name in names}
    while names and number_width + LEAST_TEXT + 4 + sum(widths[name] + 2 for name in names) > pen.width:
        names.remove(min(names, key=_worth))
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold", expand=False)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("token", overflow="fold", min_width=LEAST_TEXT)
    for name in names:
        table.add_column(TOKEN_COLUMNS[name], justify="right", no_wrap=True, min_width=widths[name])
    largest = max((abs(value) for value in kept.get("advantages", ()) if value is not None), default=0.0)
    for position, text in enumerate(kept["text"]):
        style = _style(_at(kept, "advantages", position), largest)
        numbers = [Text(_number(_at(kept, name, position)), style if name == "advantages" else "") for name in names]
        table.add_row(Text(str(position + 1), "dim"), Text(on_one_line(text), style), *numbers)
    left_out = f"{row['left_out']} more tokens are not kept" if row.get("left_out") else ""
    about = f"score {short(row['score'])}, {'finished' if row.get('finished', True) else 'cut off'}"
    return pen.lines(
        plain(str(row["prompt"]), "bold"), Text(about, "cyan"), table, *([Text(left_out)] if left_out else [])
    )


def _worth(name: str) -> int:
    """The order in which numbers give way, the first first."""
    return (
        "returns",
        "rollout_log_probs",
        "values",
        "reference_log_probs",
        "token_rewards",
        "log_probs",
        "advantages",
    ).index(name)


def _at(kept: Mapping[str, Sequence[Any]], name: str, position: int) -> float | None:
    values = kept.get(name, ())
    return values[position] if position < len(values) else None


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _style(advantage: float | None, largest: float) -> str:
    """Green where the token was better than expected, red where it was worse; faint where it hardly mattered."""
    if not advantage or not largest:
        return ""
    strength = "bold " if abs(advantage) > largest / 2 else ""
    return f"{strength}{'green' if advantage > 0 else 'red'}"
