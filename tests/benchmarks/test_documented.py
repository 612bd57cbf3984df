"""Every measured number in README and docs is the figure that it names, and none stands there without a name."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.documented import ROOT, claims, corrected, page_text, pages, unmarked
from benchmarks.figures import REFERENCE, Figure, read

FIGURES = read(REFERENCE)
KNOWN = {
    "a.rate": Figure(0.86, "share", True, "", (0.902, 0.8935, 0.86)),
    "a.kl": Figure(3.65, "nats", False, "", (2.58, 3.18, 3.65)),
    "a.count": Figure(1234.0, "items", True, ""),
}


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", pages(), ids=name)
def test_a_page_states_the_measured_figures(page: Path) -> None:
    for claim in claims(page_text(page)):
        place = f"{name(page)}:{claim.line}"
        assert claim.figure in FIGURES, (
            f"{place}: {claim.figure} is not in {name(REFERENCE)}: make bench ONLY=... KEEP=1"
        )
        assert claim.stated == claim.expected(FIGURES), (
            f"{place} states {claim.figure} as {claim.stated}, measured is {claim.expected(FIGURES)}: "
            "python -m benchmarks.documented --write corrects it"
        )


@pytest.mark.parametrize("page", pages(), ids=name)
def test_no_page_states_a_measurement_without_its_figure(page: Path) -> None:
    assert unmarked(page_text(page)) == [], (
        "name the figure of each of these numbers, or mark the table or paragraph with <!-- not measured --> "
        "(benchmarks/documented.py says how)"
    )


def test_every_figure_says_how_when_where_and_with_what_it_was_measured() -> None:
    import json

    for figure, row in json.loads(REFERENCE.read_text())["figures"].items():
        assert {"value", "unit", "higher_is_better", "method", "date", "machine", "versions"} <= set(row), figure
        assert row["method"] and row["date"] and row["machine"] and row["versions"], figure


def test_the_pages_state_numbers_at_all() -> None:
    """A guard on the reader: it finds what is known to be there."""
    stated = {claim.figure for page in pages() for claim in claims(page_text(page))}
    assert {"demo.gold_win_rate", "demo.minutes", "ppo.grpo.gold_win_rate", "ppo.without_kl.gold_fall"} <= stated


TABLE = """\
| what | seed 0 | seed 1 | seed 2 |
|---|---|---|---|
| win rate (KL) <!-- figures: a.rate, a.kl --> | 0.902 (2.58) | 0.89 (3.2) | 86 % (3.650) |
"""


def test_a_row_states_its_figures_in_order_and_by_seed() -> None:
    assert [(claim.figure, claim.selector, claim.stated) for claim in claims(TABLE)] == [
        *[("a.rate", "0", "0.902"), ("a.kl", "0", "2.58"), ("a.rate", "1", "0.89"), ("a.kl", "1", "3.2")],
        *[("a.rate", "2", "86 %"), ("a.kl", "2", "3.650")],
    ]
    assert all(claim.stated == claim.expected(KNOWN) for claim in claims(TABLE))
    assert unmarked(TABLE) == []


def test_seeds_that_do_not_begin_with_0_are_those_of_the_figure_in_order() -> None:
    text = TABLE.replace("seed 0", "seed 4").replace("seed 1", "seed 5").replace("seed 2", "seed 6")
    assert [one.selector for one in claims(text)] == [one.selector for one in claims(TABLE)]


def test_a_table_without_seeds_states_the_values() -> None:
    table = "| what | rate | KL |\n|---|---|---|\n| ours <!-- figures: a.rate, a.kl --> | 0.86 | 3.65 |\n"
    assert all(claim.stated == claim.expected(KNOWN) for claim in claims(table)) and len(claims(table)) == 2


@pytest.mark.parametrize(
    "text",
    [
        "It wins 86 %<!-- figure: a.rate --> of the time.\n",
        "From 0.86<!-- figure: a.rate@min --> to 0.902<!-- figure: a.rate@max -->, on seed 1 0.89<!-- figure: a.rate@1 -->.\n",
        "Of 1,234<!-- figure: a.count --> items.\n",
    ],
)
def test_a_sentence_states_the_figure_after_the_number(text: str) -> None:
    assert [claim.stated for claim in claims(text)] == [claim.expected(KNOWN) for claim in claims(text)] != []
    assert unmarked(text) == []


def test_numbers_that_differ_are_corrected_as_the_page_shows_them() -> None:
    wrong = TABLE.replace("0.902", "0.777").replace("86 %", "7 %") + "\nAbout 9<!-- figure: a.kl --> nats.\n"
    assert corrected(wrong, KNOWN) == TABLE + "\nAbout 4<!-- figure: a.kl --> nats.\n"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("| a | b |\n|---|---|\n| c | 0.5 |\n", [(3, "0.5")]),
        ("| a | b |\n|---|---|\n| c | 12 % of `0.7` |\n", [(3, "12 %")]),
        ("It is 12 % faster,\nand takes 5 minutes or 0.123.\n", [(1, "12 %"), (2, "5 minutes"), (2, "0.123")]),
    ],
)
def test_a_number_that_looks_measured_needs_its_figure(text: str, numbers: list[tuple[int, str]]) -> None:
    assert unmarked(text) == numbers
    assert unmarked(f"<!-- not measured -->\n\n{text}") == []
    assert unmarked(f"<!-- not measured -->\n\nA paragraph between.\n\n{text}\n") == [], (
        "on a page's first line: all of it"
    )
    assert unmarked(f"# Page\n\n<!-- not measured -->\n\nOne.\n\n{text}") != [], "elsewhere it counts for one block"


@pytest.mark.parametrize(
    "text",
    [
        "Python 3.11 to 3.13, TRL 1.16 and Qwen3-0.6B.\n",
        "    takes 5 minutes\n",
        "```\n0.123\n```\n",
        "Set `x=0.123` ([page](a-0.123.md)).\n",
    ],
)
def test_versions_and_code_are_no_measurements(text: str) -> None:
    assert unmarked(text) == []


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("Some<!-- figure: a.rate --> words.\n", "no number stands before"),
        ("| a | seed 0 |\n|---|---|\n| c <!-- figures: a.rate, a.kl --> | 0.9 |\n", "shows 1 numbers of 2 figures"),
    ],
)
def test_a_mark_without_its_numbers_is_an_error(text: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        claims(text)
