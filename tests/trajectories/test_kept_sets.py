"""A kept set comes out as it went in, takes no more than a bitmap, and follows its token through a batch and a pack."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf_ray.trajectories.batch import BatchError, TrajectoryBatch
from rlhf_ray.trajectories.kept_sets import KeptSets, bitmap_words
from rlhf_ray.trajectories.packing import SHORTEST_SHARED, pack

LENGTHS = (5, 3, 9, 4, 7)


def random_mask(tokens: int, vocabulary: int, seed: int = 0) -> Tensor:
    """Rows with one id, few, many and all."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(tokens, 1, generator=generator) ** 3
    mask = torch.rand(tokens, vocabulary, generator=generator) < share
    mask[torch.arange(tokens), torch.randint(vocabulary, (tokens,), generator=generator)] = True
    mask[::4] = True
    return mask


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 64, 1000])
def test_sets_come_out_as_they_went_in_and_take_at_most_a_bitmap(vocabulary: int) -> None:
    mask = random_mask(40, vocabulary)
    kept = KeptSets.from_mask(mask)
    assert torch.equal(kept.mask(vocabulary), mask)
    counts = mask.sum(1)
    least = torch.where(counts == vocabulary, 0, counts.clamp(max=bitmap_words(vocabulary)))
    assert torch.equal(kept.sizes.abs().long(), least) and len(kept.words) == int(least.sum())
    rows = torch.tensor([7, 0, 39, 7, 12])
    assert torch.equal(kept.select(rows).mask(vocabulary), mask[rows])
    assert torch.equal(kept.select(slice(3, 21)).mask(vocabulary), mask[3:21])
    assert KeptSets.join([kept.select(slice(0, 9)), kept.select(slice(9, 9)), kept.select(slice(9, 40))]) == kept
    assert KeptSets.from_ids([row.nonzero()[:, 0].tolist() for row in mask], vocabulary) == kept
    assert pickle.loads(pickle.dumps(kept)) == kept
    for token in range(vocabulary):
        inside = mask[:, token]
        assert kept.select(inside.nonzero()[:, 0]).contains([token] * int(inside.sum()))
        for row in (~inside).nonzero()[:, 0].tolist():
            assert not kept.select(slice(row, row + 1)).contains([token])


def test_a_token_that_was_drawn_from_nothing_is_refused() -> None:
    """No size says that: 0 would be the whole vocabulary."""
    with pytest.raises(ValueError, match="token 1 was drawn from no token at all"):
        KeptSets.from_ids([[3], []], 40)
    with pytest.raises(ValueError, match="token 1 was drawn from no token at all"):
        KeptSets.from_mask(torch.eye(3, 40, dtype=torch.bool) & torch.tensor([[True], [False], [True]]))


def test_a_short_list_costs_no_pass_over_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KeptSets, "from_mask", None)
    assert KeptSets.from_ids([[7, 3], [5]], 150_000).words.tolist() == [3, 7, 5]


def test_a_bitmap_is_read_with_a_byte_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.arange(70 * 2).view(2, 70) % 3 != 0
    kept = KeptSets.from_mask(mask)
    assert (kept.sizes < 0).all()
    made, arange = [], torch.arange

    def watched(*arguments, **options):
        made.append(arange(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(torch, "arange", watched)
    assert torch.equal(kept.mask(70), mask)
    assert [one.dtype for one in made if len(one) == 8] == [torch.uint8], "wider bits would take eight times as much"


def batch_with_sets(vocabulary: int = 100) -> tuple[TrajectoryBatch, Tensor]:
    total = sum(LENGTHS)
    mask = random_mask(total, vocabulary)
    kept = KeptSets.from_mask(mask)
    batch = TrajectoryBatch.from_sequences(
        [list(range(length)) for length in LENGTHS], prompt_id=list(range(len(LENGTHS)))
    )
    return batch.with_columns(kept_sizes=kept.sizes, kept_words=kept.words), mask


def test_sets_follow_their_tokens_through_selecting_joining_and_travelling() -> None:
    batch, mask = batch_with_sets()
    cuts = batch.offsets.tolist()
    for rows in ([3, 0, 2], [1, 2, 3], [4], [2, 2]):
        chosen = batch.select(rows)
        assert chosen.kept is not None
        assert torch.equal(chosen.kept.mask(100), torch.cat([mask[cuts[row] : cuts[row + 1]] for row in rows]))
    empty = batch.select([])
    assert empty.kept is not None and len(empty.kept) == 0
    again = TrajectoryBatch.concatenate([batch.select([3, 1]), batch.select([0, 2, 4])]).select([2, 1, 3, 0, 4])
    assert again.kept == batch.kept
    arrays = {name: np.array(array) for name, array in batch.to_arrays().items()}
    assert TrajectoryBatch.from_arrays(arrays).kept == batch.kept == pickle.loads(pickle.dumps(batch)).kept
    assert batch.without_kept().kept is None


def test_sets_that_do_not_match_their_tokens_are_refused() -> None:
    batch, _ = batch_with_sets()
    with pytest.raises(BatchError, match="'kept_words' has shape"):
        batch.with_columns(kept_words=batch["kept_words"][1:])
    with pytest.raises(BatchError, match="come together; missing: 'kept_words'"):
        batch.without("kept_words")


def test_a_pack_shares_prompts_and_no_token_that_was_sampled_from_a_cut_set() -> None:
    """Two answers begin with the same token, which one engine sampled from another set than the other did."""
    prompt = list(range(SHORTEST_SHARED))
    mask = torch.ones(2 * (len(prompt) + 2), 50, dtype=torch.bool)
    mask[len(prompt), 30:] = mask[2 * len(prompt) + 2, 10:] = False
    kept = KeptSets.from_mask(mask)
    batch = TrajectoryBatch.from_sequences(
        [[*prompt, 5, 6], [*prompt, 5, 7]], kept_sizes=kept.sizes, kept_words=kept.words
    )
    packed = pack(batch, with_kept=True)
    assert packed.kept is not None and packed.cuts == (0, len(prompt), len(prompt) + 2, len(prompt) + 4)
    assert torch.equal(packed.per_sequence(packed.kept.mask(50)), mask)
    unshared = packed.unshared()
    assert unshared.kept is not None and torch.equal(unshared.kept.mask(50), mask)
    plain = pack(batch)
    assert plain.kept is None and plain.cuts == (0, len(prompt) + 1, len(prompt) + 2, len(prompt) + 3)
