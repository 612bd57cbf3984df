"""There is no padding; the tokens of sequence i are ``offsets[i]:offsets[i + 1]``; a batch is never changed; selecting,
joining and scattering do to every column what plain Python does to lists, bit by bit, NaN included.
"""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.errors import MissingColumnError
from rlhf_ray.trajectories.batch import (
    PER_SEQUENCE,
    PER_TOKEN,
    FinishReason,
    TrajectoryBatch,
    scatter_sequences,
    scatter_tokens,
)
from tests.trajectories.batches import small

PLAIN = {name: dtype for name, dtype in PER_TOKEN.items() if name != "kept_sizes"}
"""Columns with one number per token; kept sets are in test_kept_sets.py."""
Rows = list[dict[str, Any]]
"""The slow reference: one dict a sequence, floats as their 32 bits so that every NaN equals itself."""


def bits(column: Tensor) -> list[int]:
    return (column.contiguous().view(torch.int32) if column.dtype == torch.float32 else column).tolist()


def make_rows(chance: random.Random, count: int) -> Rows:
    rows: Rows = []
    for _ in range(count):
        length = chance.randint(1, 6)
        row: dict[str, Any] = {}
        for name, dtype in {**PLAIN, "score": torch.float32, "prompt_id": torch.int64, "free": torch.int64}.items():
            numbers: list[int] = [
                chance.randint(0, 1) if dtype == torch.bool else chance.getrandbits(30) for _ in range(length)
            ]
            if name == "action_mask":
                numbers = [False, *(bool(number) for number in numbers[1:])]
            row[name] = numbers if name in PER_TOKEN else numbers[0]
            if dtype == torch.float32 and name in PER_TOKEN and chance.random() < 0.5:
                row[name][0] = 0x7FC00000 + chance.getrandbits(20)  # a NaN with a payload
        rows.append(row)
    return rows


def make_batch(rows: Rows) -> TrajectoryBatch:
    flat: dict[str, Tensor] = {}
    for name in PLAIN:
        numbers = [number for row in rows for number in row[name]]
        dtype = PER_TOKEN[name]
        if dtype == torch.float32:
            flat[name] = torch.tensor(numbers, dtype=torch.int32).view(torch.float32)
        else:
            flat[name] = torch.tensor(numbers, dtype=dtype)
    score = torch.tensor([row["score"] for row in rows], dtype=torch.int32).view(torch.float32)
    prompt_id = torch.tensor([row["prompt_id"] for row in rows], dtype=torch.int64)
    free = torch.tensor([row["free"] for row in rows], dtype=torch.int64)
    del flat["token_ids"]
    tokens = [row["token_ids"] for row in rows]
    return TrajectoryBatch.from_sequences(tokens, **flat, score=score, prompt_id=prompt_id, free=free)


def read_rows(batch: TrajectoryBatch) -> Rows:
    rows: Rows = []
    offsets = batch.offsets.tolist()
    columns = {name: bits(batch[name]) for name in batch.columns}
    for row in range(len(batch)):
        cut = slice(offsets[row], offsets[row + 1])
        rows.append({name: column[cut] if name in PER_TOKEN else column[row] for name, column in columns.items()})
    return rows


chances = st.integers(0, 2**32).map(random.Random)
rows_of_batches = st.builds(make_rows, chances, st.integers(0, 8))


# Against lists


@settings(max_examples=40, deadline=None)
@given(rows_of_batches)
def test_a_batch_holds_what_went_in(rows: Rows) -> None:
    batch = make_batch(rows)
    assert read_rows(batch) == rows
    assert len(batch) == len(rows)
    assert batch.lengths.tolist() == [len(row["token_ids"]) for row in rows]
    assert batch.num_tokens == sum(len(row["token_ids"]) for row in rows)
    assert batch.sequence_ids.tolist() == [i for i, row in enumerate(rows) for _ in row["token_ids"]]
    assert batch.position_ids.tolist() == [position for row in rows for position in range(len(row["token_ids"]))]
    assert batch.offsets.dtype == batch.sequence_ids.dtype == batch.position_ids.dtype == torch.int64


@settings(max_examples=40, deadline=None)
@given(rows_of_batches, st.lists(st.integers(0, 7), max_size=12), st.sampled_from([list, tuple, torch.tensor]))
def test_select_is_indexing_a_list(rows: Rows, indices: list[int], kind: Any) -> None:
    indices = [index for index in indices if index < len(rows)]
    selected = make_batch(rows).select(kind(indices))
    assert read_rows(selected) == [rows[index] for index in indices]
    assert {name: selected[name].dtype for name in selected.columns} == {
        name: make_batch(rows)[name].dtype for name in selected.columns
    }


@settings(max_examples=40, deadline=None)
@given(rows_of_batches, st.integers(0, 8), st.integers(0, 8))
def test_select_of_a_range_is_a_slice(rows: Rows, start: int, stop: int) -> None:
    start, stop = min(start, len(rows)), min(stop, len(rows))
    assert read_rows(make_batch(rows).select(range(start, stop))) == rows[start:stop]


@settings(max_examples=40, deadline=None)
@given(st.lists(rows_of_batches, min_size=1, max_size=4))
def test_concatenate_is_adding_lists_and_select_undoes_it(parts: list[Rows]) -> None:
    joined = TrajectoryBatch.concatenate([make_batch(rows) for rows in parts])
    assert read_rows(joined) == [row for rows in parts for row in rows]
    start = 0
    for rows in parts:
        assert read_rows(joined.select(range(start, start + len(rows)))) == rows
        start += len(rows)


@settings(max_examples=40, deadline=None)
@given(rows_of_batches, chances)
def test_scatter_undoes_any_split_into_parts(rows: Rows, chance: random.Random) -> None:
    batch = make_batch(rows)
    order = chance.sample(range(len(rows)), len(rows))
    parts: list[list[int]] = [[]]
    for index in order:
        if chance.random() < 0.4:
            parts.append([])
        parts[-1].append(index)
    dummy: tuple[list[int], Tensor] = ([], torch.full((2,), 5.0))
    tokens = [(part, batch.select(part)["log_probs"]) for part in parts if part]
    scores = [(part, batch.select(part)["score"]) for part in parts if part]
    assert bits(scatter_tokens([dummy, *tokens], batch)) == bits(batch["log_probs"])
    assert bits(scatter_sequences([*scores, dummy], batch)) == bits(batch["score"])


# Derived batches and memory


def memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def test_neighbours_share_memory_and_others_do_not() -> None:
    batch = small()
    for indices in (range(1, 3), [0, 1], torch.tensor([2]), range(3)):
        part = batch.select(indices)
        assert all(memory(part[name]) == memory(batch[name]) for name in batch.columns)
    for indices in ([1, 0], [0, 2], [1, 1]):
        part = batch.select(indices)
        assert all(memory(part[name]) != memory(batch[name]) for name in batch.columns)


def test_deriving_leaves_the_batch_as_it_was_and_shares_what_stays() -> None:
    batch = small()
    before = read_rows(batch)
    more = batch.with_columns(values=torch.ones(9), log_probs=torch.zeros(9), margin=[0.5, 1, 2])
    less = batch.without("score", "prompt_id")
    assert read_rows(batch) == before
    assert more.columns == ("token_ids", "action_mask", "log_probs", "score", "prompt_id", "values", "margin")
    assert more["log_probs"].tolist() == [0.0] * 9
    assert less.columns == ("token_ids", "action_mask", "log_probs")
    assert memory(more["token_ids"]) == memory(less["token_ids"]) == memory(batch["token_ids"])
    with pytest.raises(TypeError):
        batch.tensors["values"] = torch.ones(9)  # type: ignore[index]
    with pytest.raises(AttributeError):
        batch.offsets = torch.zeros(1)  # type: ignore[misc]


def test_the_mapping_given_by_the_caller_may_change_later() -> None:
    columns = {"token_ids": torch.tensor([1, 2])}
    batch = TrajectoryBatch(torch.tensor([0, 2]), columns)
    columns["score"] = torch.ones(5)
    assert batch.columns == ("token_ids",)


def test_to_moves_everything() -> None:
    batch = make_batch(make_rows(random.Random(0), 3)).to("meta")
    assert {batch[name].device.type for name in batch.columns} == {batch.offsets.device.type} == {"meta"}
    assert batch.device.type == "meta"


def test_parts_without_sequences_are_left_out_whatever_columns_they_have() -> None:
    full = TrajectoryBatch.from_sequences([[1, 2], [3]], log_probs=[[0.5, 1.0], [2.0]], score=[4.0, 5.0])
    empty = TrajectoryBatch.from_sequences([])
    for parts in ([full, empty], [empty, full], [empty, full, empty]):
        joined = TrajectoryBatch.concatenate(parts)
        assert joined.columns == full.columns
        assert all(torch.equal(joined[name], full[name]) for name in full.columns)


def test_an_empty_batch_is_a_batch() -> None:
    empty = TrajectoryBatch.from_sequences([], log_probs=[], score=[])
    assert len(empty) == empty.num_tokens == 0
    assert empty["log_probs"].dtype == empty["score"].dtype == torch.float32
    assert len(TrajectoryBatch.concatenate([empty, empty])) == 0
    assert scatter_tokens([], empty).shape == scatter_sequences([], empty).shape == (0,)


def test_columns_are_asked_for_by_name() -> None:
    batch = small()
    assert "score" in batch and "values" not in batch
    batch.require("score", "token_ids")
    assert repr(batch) == "TrajectoryBatch(3 sequences, 9 tokens; token_ids, action_mask, log_probs, score, prompt_id)"
    with pytest.raises(MissingColumnError, match="lacks 'values'; it has: 'token_ids', 'action_mask', 'log_probs'"):
        batch["values"]
    with pytest.raises(MissingColumnError, match="lacks 'values', 'returns'; it has"):
        batch.require("values", "score", "returns")
    with pytest.raises(MissingColumnError, match="lacks 'values'"):
        batch.without("values")


# Making from lists, arrays and tensors


def test_every_known_column_has_the_dtype_of_the_contract() -> None:
    batch = TrajectoryBatch.from_sequences(
        [[1, 2], [3]],
        **{name: [[0, 1], [0]] for name in PER_TOKEN if name != "token_ids"},
        kept_words=[7],
        **{name: [0, 1] if name == "desirable" else [1, 2] for name in PER_SEQUENCE},
    )
    assert {name: str(batch[name].dtype).removeprefix("torch.") for name in batch.columns} == {
        "token_ids": "int64",
        "action_mask": "bool",
        **dict.fromkeys(["weight_version", "kept_sizes", "kept_words"], "int32"),
        **dict.fromkeys(["rollout_log_probs", "log_probs", "reference_log_probs", "values"], "float32"),
        **dict.fromkeys(["token_rewards", "advantages", "returns", "importance_weights"], "float32"),
        "prompt_id": "int64",
        "sample_index": "int32",
        "finish_reason": "int8",
        "score": "float32",
        "bootstrap_value": "float32",
        "turn_rewards": "float32",
        "turns": "int32",
        "episode_failure": "int8",
        "reference_log_prob": "float32",
        "desirable": "bool",
    }


def test_lists_tensors_and_arrays_make_the_same_column() -> None:
    flat = [0.5, 1.5, 2.5]
    forms: list[Any] = [
        [[0.5, 1.5], [2.5]],
        [torch.tensor([0.5, 1.5]), torch.tensor([2.5], dtype=torch.float64)],
        [numpy.array([0.5, 1.5]), (2.5,)],
        torch.tensor(flat),
        numpy.array(flat, dtype=numpy.float32),
    ]
    for form in forms:
        batch = TrajectoryBatch.from_sequences([[1, 2], torch.tensor([3])], log_probs=form)
        assert batch["log_probs"].dtype == torch.float32 and batch["log_probs"].tolist() == flat
        assert batch.with_columns(values=form)["values"].tolist() == flat


def test_the_finish_reason_is_a_small_integer() -> None:
    batch = TrajectoryBatch.from_sequences([[1], [2], [3]], finish_reason=list(FinishReason))
    assert batch["finish_reason"].tolist() == [0, 1, 2] == [FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT]


def test_large_integers_keep_every_digit() -> None:
    large = 2**62 + 1
    assert TrajectoryBatch.from_sequences([[1]], prompt_id=[large])["prompt_id"].tolist() == [large]


def test_scatter_puts_tokens_where_they_belong() -> None:
    batch = small()
    tokens = scatter_tokens([((2, 0), torch.arange(7)), ((1,), torch.tensor([70, 80]))], batch)
    assert tokens.tolist() == [4, 5, 6, 70, 80, 0, 1, 2, 3]
    assert tokens.dtype == torch.int64
    assert scatter_sequences([((2, 0), torch.tensor([2.0, 0.0])), ((1,), torch.tensor([1.0]))], batch).tolist() == [
        0,
        1,
        2,
    ]


def test_nothing_warns() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrajectoryBatch.concatenate([small(), small()]).select([5, 0]).with_columns(values=[[0.0] * 4, [0.0] * 3])
