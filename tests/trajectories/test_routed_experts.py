"""The experts of a token follow it through a batch and a pack, and tokens of other experts are not shared."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_ray.rollout.requests import Generation, gather, make_requests
from rlhf_ray.trajectories.batch import BatchError, FinishReason, TrajectoryBatch
from rlhf_ray.trajectories.packing import SHORTEST_SHARED, pack
from rlhf_ray.trajectories.routed_experts import NO_EXPERT, complete, experts_dtype, numbers

LENGTHS, ROUTERS, TOP_K = (5, 3, 9, 4, 7), 3, 2


def batch_with_experts(dtype: torch.dtype = torch.uint8) -> tuple[TrajectoryBatch, Tensor]:
    total = sum(LENGTHS)
    column = torch.arange(total * ROUTERS * TOP_K).view(total, ROUTERS, TOP_K).to(dtype)
    batch = TrajectoryBatch.from_sequences(
        [list(range(length)) for length in LENGTHS], prompt_id=list(range(len(LENGTHS)))
    )
    return batch.with_columns(routed_experts=column), column


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_experts_follow_their_tokens_through_selecting_joining_and_travelling(dtype: torch.dtype) -> None:
    batch, column = batch_with_experts(dtype)
    cuts = batch.offsets.tolist()
    for rows in ([3, 0, 2], [1, 2, 3], [4], [2, 2], []):
        expected = torch.cat([column[:0], *(column[cuts[row] : cuts[row + 1]] for row in rows)])
        assert torch.equal(batch.select(rows)["routed_experts"], expected)
    again = TrajectoryBatch.concatenate([batch.select([3, 1]), batch.select([0, 2, 4])]).select([2, 1, 3, 0, 4])
    assert torch.equal(again["routed_experts"], column)
    arrays = {name: np.array(array) for name, array in batch.to_arrays().items()}
    for travelled in (TrajectoryBatch.from_arrays(arrays), pickle.loads(pickle.dumps(batch)), batch.to("cpu")):
        assert torch.equal(travelled["routed_experts"], column)
    assert "routed_experts" not in batch.without_routed() and "prompt_id" in batch.without_routed()


def test_experts_of_other_shapes_are_refused() -> None:
    batch, column = batch_with_experts()
    for wrong in (column[1:], column[:, :, 0], column.long(), column.float()):
        with pytest.raises(BatchError, match=r"must be uint8 or int16 of shape \(28, routers, experts of a token\)"):
            batch.with_columns(routed_experts=wrong)
    other = batch.with_columns(routed_experts=column[:, :2])
    with pytest.raises(BatchError, match=r"column 'routed_experts' is .* in batch 0, but .* in batch 1"):
        TrajectoryBatch.concatenate([batch, other])


@pytest.mark.parametrize(("experts", "dtype"), [(255, torch.uint8), (256, torch.int16)])
def test_every_expert_and_none_at_all_have_a_number_of_their_own(experts: int, dtype: torch.dtype) -> None:
    assert experts_dtype(experts) == dtype
    read = torch.arange(experts).view(-1, 1, 1).to(dtype)
    column = complete([read, read[:1]], [experts + 1, 3])
    assert column.dtype == dtype
    assert numbers(column).flatten().tolist() == [*range(experts), NO_EXPERT, 0, NO_EXPERT, NO_EXPERT]
    with pytest.raises(ValueError, match="experts of 2 tokens were read, but the sequence has 1"):
        complete([read[:2]], [1])


def test_the_last_token_of_an_answer_has_no_experts_and_all_others_have_those_that_came_with_it() -> None:
    requests = make_requests([(0, [5, 6, 7]), (1, [8])], samples_per_prompt=1, max_new_tokens=2)
    read = [np.full((4, ROUTERS, TOP_K), 3, np.uint8), np.full((2, ROUTERS, TOP_K), 4, np.uint8)]
    done = [
        Generation(request.prompt_id, 0, (2, 1), (-1.0, -1.0), (0, 0), FinishReason.STOP, routed=own)
        for request, own in zip(requests, read, strict=True)
    ]
    column = gather(requests, done)["routed_experts"]
    assert column.shape == (8, ROUTERS, TOP_K) and column[:, 1, 1].tolist() == [3, 3, 3, 3, 255, 4, 4, 255]


def test_a_pack_shares_a_prompt_up_to_the_first_token_that_was_sent_elsewhere() -> None:
    """One engine sends the token behind the shared ones of the second answer elsewhere; a pack without experts shares all."""
    prompt = list(range(SHORTEST_SHARED + 3))
    column = torch.zeros(2 * (len(prompt) + 2), ROUTERS, TOP_K, dtype=torch.uint8)
    column[len(prompt) + 2 + SHORTEST_SHARED + 1, 2, 1] = 7
    batch = TrajectoryBatch.from_sequences([[*prompt, 5, 6], [*prompt, 8, 7]], routed_experts=column)
    packed = pack(batch, with_routed=True)
    assert packed.routed is not None and packed.parent is not None
    assert packed.cuts == (0, len(prompt) - 2, len(prompt) + 2, len(prompt) + 6)
    for whole in (packed, packed.to("cpu")):
        assert whole.routed is not None and torch.equal(whole.per_sequence(whole.routed), column)
        apart = whole.unshared()
        assert apart.routed is not None and torch.equal(apart.routed, column)
    plain = pack(batch)
    assert plain.routed is None and plain.cuts == (0, len(prompt), len(prompt) + 2, len(prompt) + 4)
