"""What cannot be a batch, a selection or a result of micro-batches is refused, and the message names it."""

from __future__ import annotations

from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from rlhf_ray.errors import RlhfRayError
from rlhf_ray.trajectories.batch import (
    BatchError,
    TrajectoryBatch,
    scatter_sequences,
    scatter_tokens,
)
from tests.trajectories.batches import small

REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "token column, wrong count": ({"values": torch.zeros(8)}, ["'values'", "(8,)", "9 tokens"]),
    "token column with one number a sequence": ({"values": torch.zeros(3)}, ["'values'", "(3,)", "9 tokens"]),
    "sequence column, one number a token": ({"score": torch.zeros(9)}, ["'score'", "(9,)", "3 sequences"]),
    "free column, one number a token": ({"margin": torch.zeros(9)}, ["'margin'", "(9,)", "3 sequences"]),
    "two dimensions": ({"values": torch.zeros(9, 1)}, ["'values'", "(9, 1)"]),
    "no dimension": ({"score": torch.tensor(1.0)}, ["'score'", "()"]),
    "float64": ({"values": torch.zeros(9).double()}, ["'values'", "must be float32", "not float64"]),
    "bfloat16": ({"log_probs": torch.zeros(9).bfloat16()}, ["'log_probs'", "must be float32", "not bfloat16"]),
    "integer mask": ({"action_mask": torch.zeros(9).long()}, ["'action_mask'", "must be bool", "not int64"]),
    "wide version": ({"weight_version": torch.zeros(9).long()}, ["'weight_version'", "must be int32", "not int64"]),
    "array of another dtype": ({"score": numpy.zeros(3)}, ["'score'", "must be float32", "not float64"]),
    "free bfloat16": ({"margin": torch.zeros(3).bfloat16()}, ["free column 'margin'", "float32", "not bfloat16"]),
    "free complex": ({"margin": torch.zeros(3, dtype=torch.complex64)}, ["free column 'margin'", "not complex64"]),
    "gradient": ({"values": torch.zeros(9, requires_grad=True)}, ["'values'", "gradient", "detach()"]),
    "another device": ({"values": torch.zeros(9, device="meta")}, ["'values'", "on meta", "on cpu"]),
    "first token an action": (
        {"action_mask": [[0, 1, 1], [1, 1], [0, 0, 0, 1]]},
        ["action_mask", "first token of sequence 1"],
    ),
    "too many lists": ({"values": [[0.0] * 3, [0.0] * 2]}, ["'values'", "2 sequences", "3"]),
    "short list": ({"values": [[0.0] * 3, [0.0], [0.0] * 4]}, ["'values'", "sequence 1", "(1,)", "2 tokens"]),
    "flat list for tokens": ({"values": [0.0, 1.0, 2.0]}, ["'values'", "sequence 0", "()"]),
    "float as version": ({"weight_version": [[1, 1, 1], [1.5, 1], [1] * 4]}, ["'weight_version'", "int32", "1.5"]),
    "two as a flag": ({"action_mask": [[0, 2, 1], [0, 1], [0] * 4]}, ["'action_mask'", "bool", "hold 2"]),
    "overflow": ({"finish_reason": [0, 300, 1]}, ["'finish_reason'", "int8", "hold 300"]),
    "NaN as an integer": ({"prompt_id": [1, float("nan"), 3]}, ["'prompt_id'", "int64", "nan"]),
    "text": ({"prompt_id": ["a", "b", "c"]}, ["'prompt_id'", "numbers"]),
    "text array": ({"prompt_id": numpy.array(["a", "b", "c"])}, ["'prompt_id'", "cannot be a tensor"]),
    "None": ({"score": [1.0, None, 2.0]}, ["'score'", "numbers"]),
    "the name of the offsets": ({"offsets": torch.zeros(3)}, ["'offsets'"]),
}


@pytest.mark.parametrize(("columns", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_column_is_refused_by_name(columns: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(BatchError) as caught:
        small().with_columns(**columns)
    with pytest.raises(BatchError):
        TrajectoryBatch.from_sequences([[1, 2, 3], [4, 5], [6, 7, 8, 9]], **columns)
    for word in words:
        assert word in str(caught.value)
    assert isinstance(caught.value, RlhfRayError)


@pytest.mark.parametrize(
    ("offsets", "words"),
    [
        (torch.tensor([0, 2, 5]), ["end at 5", "4 tokens"]),
        (torch.tensor([0, 2, 3]), ["end at 3", "4 tokens"]),
        (torch.tensor([1, 4]), ["start at 0, not at 1"]),
        (torch.tensor([0, 2, 2, 4]), ["sequence 1 has 0 tokens"]),
        (torch.tensor([0, 3, 2, 4]), ["sequence 1 has -1 tokens"]),
        (torch.tensor([0, 4], dtype=torch.int32), ["offsets must be an int64", "int32"]),
        (torch.tensor([], dtype=torch.int64), ["shape (sequences + 1,)", "(0,)"]),
        (torch.tensor([[0, 4]]), ["(1, 2)"]),
    ],
)
def test_wrong_offsets_are_refused(offsets: Tensor, words: list[str]) -> None:
    with pytest.raises(BatchError) as caught:
        TrajectoryBatch(offsets, {"token_ids": torch.zeros(4).long(), "action_mask": torch.zeros(4).bool()})
    for word in words:
        assert word in str(caught.value)


def test_a_batch_needs_tokens() -> None:
    with pytest.raises(BatchError, match="needs the column 'token_ids'"):
        TrajectoryBatch(torch.tensor([0]), {})
    with pytest.raises(BatchError, match="needs the column 'token_ids'"):
        small().without("token_ids")
    with pytest.raises(BatchError, match="sequence 1 has 0 tokens"):
        TrajectoryBatch.from_sequences([[1], []])


@pytest.mark.parametrize("indices", [[3], [-1], [0, 7]])
def test_select_refuses_sequences_that_are_not_there(indices: list[int]) -> None:
    with pytest.raises(BatchError, match=f"sequence {indices[-1]} is not in the batch, which has 3"):
        small().select(indices)


def test_select_refuses_a_mask() -> None:
    """A mask read as indices would be rows 0 and 1."""
    with pytest.raises(BatchError, match="list of their indices, not by a tensor of bool"):
        small().select(torch.tensor([True, False, True]))


def test_concatenate_names_what_differs() -> None:
    batch = small()
    with pytest.raises(
        BatchError, match="batch 1 has other columns than batch 0: it lacks 'score' and has 'margin' bes"
    ):
        TrajectoryBatch.concatenate([batch, batch.without("score").with_columns(margin=[1, 2, 3])])
    with pytest.raises(BatchError, match=r"'margin' is .*int64.* in batch 0, but .*float32.* in batch 1"):
        TrajectoryBatch.concatenate([batch.with_columns(margin=[1, 2, 3]), batch.with_columns(margin=[1.0, 2, 3])])
    with pytest.raises(BatchError, match="nothing to concatenate"):
        TrajectoryBatch.concatenate([])


def test_scatter_refuses_what_is_missing_or_comes_twice() -> None:
    batch = small()
    first, second, third = torch.zeros(3), torch.zeros(2), torch.zeros(4)
    with pytest.raises(BatchError, match=r"every sequence once; missing: 1$"):
        scatter_tokens([((0,), first), ((2,), third)], batch)
    with pytest.raises(BatchError, match=r"every sequence once; given more than once: 0$"):
        scatter_tokens([((0, 1), torch.zeros(5)), ((2, 0), torch.zeros(7))], batch)
    with pytest.raises(BatchError, match="missing: 0; given more than once: 1"):
        scatter_sequences([((1, 1), torch.zeros(2)), ((2,), torch.zeros(1))], batch)
    with pytest.raises(BatchError, match=r"missing: 0, 1, 2$"):
        scatter_sequences([], batch)
    with pytest.raises(BatchError, match="sequence 3 is not in the batch"):
        scatter_tokens([((0, 1, 2, 3), torch.zeros(12))], batch)
    many = TrajectoryBatch.from_sequences([[1]] * 20)
    with pytest.raises(BatchError, match=r"missing: 0, 1, 2, 3, 4, 5, 6, 7, \.\.\. \(19 in all\)"):
        scatter_tokens([((19,), torch.zeros(1))], many)
    with pytest.raises(BatchError, match=r"part 1 \(sequences 1\) must have shape \(2,\), not \(1,\)"):
        scatter_tokens([((0,), first), ((1,), torch.zeros(1)), ((2,), third)], batch)
    with pytest.raises(BatchError, match=r"part 0 \(sequences 0\) must have shape \(3,\), not \(3, 1\)"):
        scatter_tokens([((0,), first[:, None]), ((1,), second), ((2,), third)], batch)
    with pytest.raises(BatchError, match=r"part 1 is torch.float64, but the first part is torch.float32"):
        scatter_tokens([((0,), first), ((1,), second.double()), ((2,), third)], batch)
