"""Every listed column and finish reason has a meaning, a unit and a writer, and docs/algorithms.md shows just these."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rlhf_ray.trajectories.columns import (
    COLUMNS,
    FINISH_REASONS,
    KEPT,
    PER_SEQUENCE,
    PER_TOKEN,
    ROUTED_DTYPES,
    Column,
    FinishReason,
)

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "algorithms.md").read_text()


def short(column: Column) -> str:
    if column.over == "routers":
        return " or ".join(f"`{dtype}`".replace("torch.", "") for dtype in ROUTED_DTYPES)
    return "any number" if column.dtype is None else f"`{column.dtype}`".replace("torch.", "")


def columns_table(over: str) -> str:
    """The markdown table of the columns over tokens, or over sequences."""
    rows = [
        f"| `{name}` | {short(column)} | {column.meaning} | {column.unit} | {column.writer} |"
        for name, column in COLUMNS.items()
        if column.over == over
    ]
    return "\n".join(["| column | dtype | meaning | unit | who writes it |", "|---|---|---|---|---|", *rows])


def finish_reasons_table() -> str:
    rows = [
        f"| {int(reason)} | `{reason.name}` | {facts.meaning} | {facts.writer} |"
        for reason, facts in FINISH_REASONS.items()
    ]
    return "\n".join(["| number | name | meaning | who sets it |", "|---|---|---|---|", *rows])


def modules(writer: str) -> list[str]:
    return re.findall(r"`([a-z_/]+\.py)`", writer)


@pytest.mark.parametrize(
    "table",
    [
        columns_table("tokens"),
        columns_table("sequences"),
        columns_table("kept"),
        columns_table("routers"),
        finish_reasons_table(),
    ],
    ids=["tokens", "rows", "kept", "routers", "ends"],
)
def test_the_page_shows_the_registry(table: str) -> None:
    assert table in PAGE, f"docs/algorithms.md must hold this table:\n\n{table}\n"


def test_every_column_with_a_dtype_is_in_one_of_the_tables() -> None:
    assert {name: c.dtype for name, c in COLUMNS.items() if c.dtype is not None} == {
        **PER_TOKEN,
        **PER_SEQUENCE,
        **KEPT,
    }
    assert len({*PER_TOKEN, *PER_SEQUENCE, *KEPT}) == len(PER_TOKEN) + len(PER_SEQUENCE) + len(KEPT)
    assert all(column.dtype is not None for column in COLUMNS.values() if column.over == "tokens")


@pytest.mark.parametrize("name", COLUMNS)
def test_a_column_says_what_it_means_and_who_writes_it(name: str) -> None:
    column = COLUMNS[name]
    assert column.unit and column.writer and column.meaning[0].isupper() and column.meaning.endswith("."), name
    assert modules(column.writer) or "of your own" in column.writer, "name the modules that make it"
    for module in modules(column.writer):
        assert re.search(rf'\b{name}\b(=|"|\b)', (ROOT / "rlhf_ray" / module).read_text()), (name, module)


def test_a_finish_reason_says_what_it_means_and_who_sets_it() -> None:
    assert set(FINISH_REASONS) == set(FinishReason)
    for reason, facts in FINISH_REASONS.items():
        assert facts.meaning.endswith("."), reason
        for module in modules(facts.writer):
            assert f"FinishReason.{reason.name}" in (ROOT / "rlhf_ray" / module).read_text(), (reason, module)


def test_every_column_that_the_package_makes_or_reads_is_listed() -> None:
    """A new column cannot slip in without its meaning: names at `batch["..."]` and in `with_columns(...=`."""
    read = re.compile(r'\b(?:batch|micro_batch|trajectories)\["(\w+)"\]')
    written = re.compile(r"\.with_columns\(([^)]*)\)")
    for path in (ROOT / "rlhf_ray").rglob("*.py"):
        text = path.read_text()
        names = {*read.findall(text), *re.findall(r"(\w+)=", " ".join(written.findall(text)))}
        assert names <= COLUMNS.keys(), (path, names - COLUMNS.keys())
