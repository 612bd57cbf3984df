"""Examples put together as the batch that a training update runs on.

Invariant: nothing that a row says beside its tokens is lost: numbers that all its pairs have become columns of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch

from rlhf_ray.data.encoded_pairs import PairExample
from rlhf_ray.rows.preferences import PAIR_NUMBERS
from rlhf_ray.trajectories.batch import TrajectoryBatch


@dataclass(frozen=True)
class DemonstrationExample:
    """Token ids of a demonstration and which of them are the answer, its end of sequence included."""

    token_ids: list[int]
    action_mask: list[bool]


def make_demonstration_batch(examples: Sequence[DemonstrationExample]) -> TrajectoryBatch:
    """One sequence an example."""
    return TrajectoryBatch.from_sequences(
        [example.token_ids for example in examples], action_mask=[example.action_mask for example in examples]
    )


@dataclass(frozen=True, eq=False)
class JudgedExample:
    """Token ids of a prompt, of an answer whose label says whether it is desirable, and of an answer to another prompt."""

    prompt: Sequence[int]
    answer: Sequence[int]
    """Its end of sequence included."""
    desirable: bool
    other_answer: Sequence[int] = ()
    """What the reference point of KTO is measured with, after the same prompt."""
    reference: tuple[float, float] | None = None
    """The log-probs in nats of the answer and of the other one under the model that training starts from, where they are
    known."""


def make_policy_pair_batch(examples: Sequence[PairExample]) -> TrajectoryBatch:
    """Two sequences an example: 2i is the chosen side, 2i+1 the rejected one, each with its answer as actions.

    Column ``reference_log_prob`` of shape (B,) is there where all examples know it.
    """
    for example in examples:
        if not example.chosen_answer or not example.rejected_answer:
            raise ValueError("a pair says of neither side, or of one only, how long its answer is")
    sides = [
        (side, len(side) - answer)
        for example in examples
        for side, answer in ((example.chosen, example.chosen_answer), (example.rejected, example.rejected_answer))
    ]
    columns = _reference_column([example.reference for example in examples], per_example=2)
    return _make_answer_batch(sides, columns)


def make_judged_batch(examples: Sequence[JudgedExample]) -> TrajectoryBatch:
    """One sequence an example, with its answer as actions, and the columns ``desirable`` and ``reference_log_prob`` (B,)."""
    columns = _reference_column([example.reference for example in examples], per_example=1)
    columns["desirable"] = torch.tensor([example.desirable for example in examples], dtype=torch.bool)
    return _make_answer_batch([_after(example.prompt, example.answer) for example in examples], columns)


def make_other_answers_batch(examples: Sequence[JudgedExample]) -> TrajectoryBatch:
    """One sequence an example: its prompt, and the answer to another prompt as actions."""
    return _make_answer_batch([_after(example.prompt, example.other_answer) for example in examples], {})


def make_both_answers_batch(examples: Sequence[JudgedExample]) -> TrajectoryBatch:
    """Two sequences an example: 2i is its prompt and answer, 2i+1 its prompt and the answer to another prompt."""
    answers = ((example.prompt, one) for example in examples for one in (example.answer, example.other_answer))
    return _make_answer_batch([_after(prompt, answer) for prompt, answer in answers], {})


def _after(prompt: Sequence[int], answer: Sequence[int]) -> tuple[Sequence[int], int]:
    return numpy.concatenate([prompt, answer]), len(prompt)  # type: ignore[return-value]


def _reference_column(references: Sequence[tuple[float, float] | None], per_example: int) -> dict[str, torch.Tensor]:
    """The column ``reference_log_prob`` with the first ``per_example`` numbers of each example, where all are known."""
    known = [number for one in references if one is not None for number in one[:per_example]]
    if len(known) < per_example * len(references):
        return {}
    return {"reference_log_prob": torch.tensor(known, dtype=torch.float32)}


def _make_answer_batch(sides: Sequence[tuple[Sequence[int], int]], columns: dict[str, torch.Tensor]) -> TrajectoryBatch:
    """A batch of sequences, each with the place at which its answer begins; the first token is never an action."""
    ids = [numpy.asarray(side) for side, _ in sides]
    offsets = numpy.concatenate([[0], numpy.cumsum([len(side) for side in ids])])
    begins = [max(begin, 1) for _, begin in sides]
    mask = numpy.concatenate([numpy.arange(len(side)) >= begin for side, begin in zip(ids, begins, strict=True)])
    columns = {
        "token_ids": torch.from_numpy(numpy.concatenate(ids).astype(numpy.int64)),
        "action_mask": torch.from_numpy(mask),
        **columns,
    }
    return TrajectoryBatch(torch.from_numpy(offsets.astype(numpy.int64)), columns)


def make_pair_batch(examples: Sequence[PairExample]) -> TrajectoryBatch:
    """Two sequences an example: 2i is the chosen side, 2i+1 the rejected one.

    Columns ``margin`` and ``grade`` of shape (B,) hold the number of the pair at both of its sequences, where all pairs have
    one.
    """
    sides = [numpy.asarray(side) for example in examples for side in (example.chosen, example.rejected)]
    offsets = numpy.concatenate([[0], numpy.cumsum([len(side) for side in sides])])
    columns = {"token_ids": torch.from_numpy(numpy.concatenate(sides).astype(numpy.int64))}
    for name in PAIR_NUMBERS:
        numbers = [getattr(example, name) for example in examples]
        if None not in numbers:
            columns[name] = torch.tensor(numbers, dtype=torch.float32).repeat_interleave(2)
    return TrajectoryBatch(torch.from_numpy(offsets.astype(numpy.int64)), columns)
