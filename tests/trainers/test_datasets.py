"""What a config names becomes examples: nothing of a row is lost on the way to a batch."""

from __future__ import annotations

import pytest
import torch

from rlhf_ray.trainers.datasets import PairExample, pair_batch


def test_a_batch_of_pairs_holds_chosen_and_rejected_in_turn() -> None:
    examples = [PairExample([1, 2, 3], [1, 4], margin=0.5, grade=0.0), PairExample([5], [6, 7], margin=2.0, grade=-1.0)]
    batch = pair_batch(examples)
    assert batch["token_ids"].tolist() == [1, 2, 3, 1, 4, 5, 6, 7]
    assert batch.lengths.tolist() == [3, 2, 1, 2]
    assert batch["margin"].tolist() == [0.5, 0.5, 2.0, 2.0]
    assert batch["grade"].tolist() == [0.0, 0.0, -1.0, -1.0]
    assert batch["margin"].dtype == batch["grade"].dtype == torch.float32


@pytest.mark.parametrize("given", [{}, {"margin": 1.0}, {"grade": 0.0}])
def test_a_batch_has_the_columns_that_its_pairs_have(given: dict[str, float]) -> None:
    batch = pair_batch([PairExample([1], [2], **given)] * 2)
    assert set(batch.columns) == {"token_ids", *given}
