"""The same rows give the same pairs in whatever file or folder they lie, and whoever wrote it.

Arrow gives every mapping of a column the fields that any of them has, and ``datasets`` keeps as JSON text what differs in
shape; neither may reach a pair.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets import Dataset
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pyarrow import ArrowException

from rlhf_ray.rows.preferences import PreferencePair, PreferenceReader
from rlhf_ray.rows.read import first_problem, read_file

Rows = list[dict[str, Any]]
TEXTS = st.sampled_from(["a", '"quoted" text', "[1] one", "{x}", "nothing", "zwei\nZeilen"])
"""None is JSON by itself: where a column mixes types, ``datasets`` 5.2 takes such a text for what it spells."""
VALUES = st.recursive(
    TEXTS | st.integers(0, 9) | st.booleans(), lambda inner: st.lists(inner, min_size=1, max_size=2), max_leaves=3
)
NAMES = st.sampled_from(["x", "y", "role"])
FIELDS = st.dictionaries(NAMES, VALUES, max_size=2)


def said(role: str) -> st.SearchStrategy[dict[str, Any]]:
    optional = {"name": st.just("n"), "reasoning_content": TEXTS}
    return st.fixed_dictionaries({"role": st.just(role), "content": TEXTS}, optional=optional)


def function(arguments: str, content: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {"type": st.just("function"), "function": st.fixed_dictionaries({"name": NAMES, arguments: content})}
    )


CALLS = st.fixed_dictionaries(
    {"role": st.just("assistant"), "tool_calls": st.lists(function("arguments", FIELDS), min_size=1, max_size=2)},
    optional={"content": st.sampled_from([None, "", "wait"])},
)
ANSWERS = st.lists(said("assistant"), min_size=1, max_size=1) | st.tuples(CALLS, said("tool"), said("assistant")).map(
    list
)
SCHEMAS = st.fixed_dictionaries({"type": st.just("object"), "properties": st.dictionaries(NAMES, FIELDS, max_size=2)})
ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.lists(said("user"), min_size=1, max_size=1) | TEXTS,
            "chosen": ANSWERS,
            "rejected": ANSWERS,
            "tools": st.none() | st.lists(function("parameters", SCHEMAS), max_size=2),
            "system": st.none() | TEXTS,
        }
    ),
    min_size=1,
    max_size=3,
)


def pairs_in(path: Path) -> list[PreferencePair]:
    assert first_problem(path, PreferenceReader()) == ""
    return list(read_file(path, PreferenceReader()))


def written(rows: Rows, folder: Path) -> Iterator[Path]:
    """The rows as users write them; what Arrow cannot hold (such as a mapping that is always empty) is not written so."""
    lines = folder / "rows.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rows.json").write_text(json.dumps(rows, indent=1))
    yield folder / "rows.json"
    makers = (lambda: Dataset.from_list(rows), lambda: Dataset.from_json(str(lines), cache_dir=str(folder / "cache")))
    for number, make in enumerate(makers):
        parquets, saved, json_lines = (folder / f"{name}{number}" for name in ("parquet", "saved", "lines"))
        parquets.mkdir()
        try:
            data_set = make()
            data_set.to_parquet(parquets / "rows.parquet")
        except (ArrowException, datasets.exceptions.DatasetGenerationError):
            continue
        data_set.save_to_disk(saved)
        data_set.to_json(json_lines.with_suffix(".jsonl"))
        yield from (
            parquets,
            parquets / "rows.parquet",
            saved,
            json_lines.with_suffix(".jsonl"),
            *saved.glob("*.arrow"),
        )


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "library")
    datasets.disable_progress_bars()


@settings(
    max_examples=8, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True, phases=[Phase.generate]
)
@given(rows=ROWS)
def test_pairs_do_not_depend_on_the_file_that_holds_them(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("rows")
    paths = list(written(rows, folder))
    expected = pairs_in(folder / "rows.jsonl")
    for path in paths:
        assert pairs_in(path) == expected, path
