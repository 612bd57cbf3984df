"""The samples of a step, answers to one prompt side by side, and one sample token by token.

Invariants: every text is shown whole, as text. A number that was not kept is left out and never shown as 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from rlhf_ray.console import on_one_line
from rlhf_ray.monitoring.terminal.drawing import Pen, plain, short
from rlhf_ray.monitoring.tokens import COLUMNS, SampleRow, token_table

NARROWEST = 30
"""Columns of an answer that stands beside another one."""
LEAST_TEXT = 12
"""Columns of a token's text, before numbers are left out of a narrow table."""
STYLES = {2: "bold green", 1: "green", 0: "", -1: "red", -2: "bold red"}
"""Of a token, by how much better or worse it was than expected."""


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
    tokens = token_table(row)
    if tokens is None:
        return pen.lines(Text("nothing is kept of the tokens of this sample"))
    names = list(tokens.columns)
    number_width = len(str(len(tokens.rows)))
    widths = {name: max(len(COLUMNS[name]), *(len(one.numbers[name]) for one in tokens.rows), 0) for name in names}
    while names and number_width + LEAST_TEXT + 4 + sum(widths[name] + 2 for name in names) > pen.width:
        names.remove(min(names, key=_worth))
    table = Table(box=None, padding=(0, 1), pad_edge=False, header_style="bold", expand=False)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("token", overflow="fold", min_width=LEAST_TEXT)
    for name in names:
        table.add_column(COLUMNS[name], justify="right", no_wrap=True, min_width=widths[name])
    for one in tokens.rows:
        style = STYLES[one.tone]
        numbers = [Text(one.numbers[name], style if name == "advantages" else "") for name in names]
        table.add_row(Text(str(one.number), "dim"), Text(on_one_line(one.text), style), *numbers)
    left_out = [Text(tokens.left_out)] if tokens.left_out else []
    return pen.lines(plain(str(row["prompt"]), "bold"), Text(tokens.about, "cyan"), table, *left_out)


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
