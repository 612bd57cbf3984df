"""A pack holds at least one segment; following the parents of one that no other continues gives a sequence whole; packing
neither changes nor reorders the tokens of a sequence, nor the sequences.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.trajectories import packing
from rlhf_ray.trajectories.batch import BatchError, TrajectoryBatch
from rlhf_ray.trajectories.packing import Packed, group_by_prefix, pack
from rlhf_ray.trajectories.schedule import make_schedule

sequences = st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=5), min_size=1, max_size=6)


def segments(packed: Packed) -> list[list[int]]:
    cuts = packed.offsets.tolist()
    return [packed.token_ids.tolist()[cuts[i] : cuts[i + 1]] for i in range(len(cuts) - 1)]


@settings(max_examples=40, deadline=None)
@given(sequences, st.lists(st.integers(0, 5), min_size=1, max_size=6))
def test_segments_are_the_chosen_sequences_in_order(token_ids: list[list[int]], indices: list[int]) -> None:
    indices = [index % len(token_ids) for index in indices]
    packed = pack(TrajectoryBatch.from_sequences(token_ids), indices)
    assert segments(packed) == [token_ids[index] for index in indices]
    assert packed.position_ids.tolist() == [i for index in indices for i in range(len(token_ids[index]))]
    assert len(packed) == len(indices)
    assert packed.num_tokens == sum(packed.lengths.tolist()) == sum(len(token_ids[index]) for index in indices)
    assert packed.parent is None


@settings(max_examples=40, deadline=None)
@given(sequences, st.integers(1, 4))
def test_a_schedule_packs_every_sequence_once(token_ids: list[list[int]], ranks: int) -> None:
    batch = TrajectoryBatch.from_sequences(token_ids)
    schedule = make_schedule(batch.lengths.tolist(), ranks=ranks, max_tokens=7)
    packs = [(micro_batch, pack(batch, micro_batch)) for rank in range(ranks) for micro_batch in schedule.rank(rank)]
    assert all(packed.num_tokens <= 7 for _, packed in packs)
    packed_segments = {i: s for chosen, packed in packs for i, s in zip(chosen, segments(packed), strict=False)}
    assert packed_segments == dict(enumerate(token_ids))


@st.composite
def alike(draw: st.DrawFn) -> list[list[int]]:
    """Runs of sequences that begin alike; few different tokens, so that others do too."""
    sequences: list[list[int]] = []
    for _ in range(draw(st.integers(1, 4))):
        prefix = draw(st.lists(st.integers(0, 1), max_size=8))
        for _ in range(draw(st.integers(1, 4))):
            sequences.append(prefix + draw(st.lists(st.integers(0, 1), min_size=0 if prefix else 1, max_size=5)))
    return sequences


@settings(max_examples=200, deadline=None)
@given(alike(), st.integers(1, 4))
def test_sharing_keeps_every_sequence_and_runs_no_more_tokens(token_ids: list[list[int]], shortest: int) -> None:
    batch = TrajectoryBatch.from_sequences(token_ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SHORTEST_SHARED", shortest)
        shared = pack(batch)
    whole = pack(batch, share_prefixes=False)
    assert whole.parent is None
    assert torch.equal(shared.per_sequence(shared.token_ids), whole.token_ids)
    assert torch.equal(shared.per_sequence(shared.position_ids), whole.position_ids)
    assert torch.equal(shared.token_ids[shared.last_tokens], whole.token_ids[whole.last_tokens])
    before = shared.previous_tokens[shared.sequence_tokens]
    assert torch.equal(before >= 0, whole.previous_tokens >= 0)
    assert torch.equal(
        shared.token_ids[before[before >= 0]], whole.token_ids[whole.previous_tokens[whole.previous_tokens >= 0]]
    )
    assert torch.equal(shared.position_ids[before[before >= 0]] + 1, whole.position_ids[whole.previous_tokens >= 0])
    assert len(shared.sequences) == len(shared.last_tokens) == len(token_ids)
    children = [0] * len(shared) if shared.parent is None else shared.parent[shared.parent >= 0].bincount().tolist()
    saved = sum((count - 1) * int(shared.lengths[i]) for i, count in enumerate(children) if count)
    assert shared.num_tokens == whole.num_tokens - saved
    assert all(count != 1 and (count == 0 or int(shared.lengths[i]) >= shortest) for i, count in enumerate(children))


def test_a_pair_and_the_samples_of_a_prompt_share_what_they_begin_with() -> None:
    prompt, other = list(range(20)), list(range(50, 90))
    rows = [[*prompt, 30], [*prompt, 31, 32], other, [*other, 1, 2], [*other, 1, 3], [7]]
    packed = pack(TrajectoryBatch.from_sequences(rows))
    assert packed.parent is not None
    assert packed.parent.tolist() == [-1, 0, 0, -1, 3, 3, 3, -1]
    assert segments(packed) == [prompt, [30], [31, 32], other[:-1], [89], [89, 1, 2], [89, 1, 3], [7]]


def test_short_beginnings_are_not_shared() -> None:
    """And a longer one that saves more is not given up for them."""
    rows = [[1] * 15 + [2], [1] * 15 + [3], [*range(40), 1], [*range(40), 2], [*range(17), 3]]
    packed = pack(TrajectoryBatch.from_sequences(rows))
    assert packed.parent is not None and packed.parent.tolist() == [-1, -1, -1, 2, 2, -1]


def test_without_indices_the_whole_batch_is_packed_without_a_copy() -> None:
    batch = TrajectoryBatch.from_sequences([[5, 6], [7]])
    assert segments(pack(batch)) == [[5, 6], [7]]
    assert pack(batch).token_ids.data_ptr() == batch["token_ids"].data_ptr()


def test_nothing_to_pack_is_the_dummy() -> None:
    batch = TrajectoryBatch.from_sequences([[5, 6], [7]])
    for packed in (pack(batch, ()), pack(TrajectoryBatch.from_sequences([])), Packed.dummy()):
        assert segments(packed) == [[0, 0]]
        assert packed.position_ids.tolist() == [0, 1]
        assert {packed.token_ids.dtype, packed.offsets.dtype, packed.position_ids.dtype} == {torch.int64}


def test_to_moves_everything() -> None:
    packed = Packed(torch.tensor([1, 2]), torch.tensor([0, 1, 2]), torch.tensor([0, 1]), torch.tensor([-1, 0]))
    moved = packed.to("meta")
    assert moved.parent is not None
    assert {t.device.type for t in (moved.token_ids, moved.offsets, moved.position_ids, moved.parent)} == {"meta"}
    assert Packed.dummy("meta").token_ids.device.type == "meta"
    assert packed.to("cpu").parent is not None


@pytest.mark.usefixtures("outside_pytest")
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"token_ids": torch.tensor([1, 2, 3])}, ["position_ids", "(3,)"]),
        ({"token_ids": torch.tensor([1.0, 2.0])}, ["token_ids", "int64", "float32"]),
        ({"position_ids": torch.tensor([0])}, ["position_ids", "(2,)", "(1,)"]),
        ({"offsets": torch.tensor([0, 1, 3])}, ["offsets of a pack end at 3", "2 tokens"]),
        ({"offsets": torch.tensor([0, 0, 2])}, ["sequence 0 has 0 tokens"]),
        ({"parent": torch.tensor([-1])}, ["parent", "(2,)"]),
        ({"parent": torch.tensor([-1, 1])}, ["segment 1", "cannot continue segment 1"]),
        ({"parent": torch.tensor([1, -1])}, ["segment 0", "cannot continue segment 1"]),
        ({"parent": torch.tensor([-1, -2])}, ["segment 1", "cannot continue segment -2"]),
        ({"position_ids": torch.tensor([0, 0])}, ["segment 1", "position 0", "continues segment 0"]),
        ({"position_ids": torch.tensor([1, 2])}, ["segment 0", "position 1", "begin at 0"]),
    ],
)
def test_a_wrong_pack_is_refused(changed: dict[str, torch.Tensor], words: list[str]) -> None:
    right = {
        "token_ids": torch.tensor([1, 2]),
        "offsets": torch.tensor([0, 1, 2]),
        "position_ids": torch.tensor([0, 1]),
        "parent": torch.tensor([-1, 0]),
    }
    Packed(**right)
    with pytest.raises(BatchError) as caught:
        Packed(**{**right, **changed})
    for word in words:
        assert word in str(caught.value)


def test_a_pack_without_segments_is_refused() -> None:
    nothing = torch.empty(0, dtype=torch.int64)
    with pytest.raises(BatchError, match=r"at least one segment: use Packed.dummy\(\)"):
        Packed(nothing, torch.tensor([0]), nothing)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 2), st.lists(st.integers(0, 3), min_size=1, max_size=6)), max_size=12),
    st.integers(8, 40),
)
def test_families_have_every_sequence_once_begin_alike_and_fit(
    drawn: list[tuple[int, list[int]]], max_tokens: int
) -> None:
    sequences = [[before] * 2 + rest for before, rest in drawn]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "SHORTEST_SHARED", 2)
        groups = group_by_prefix(sequences, max_tokens)
    assert sorted(number for family in groups for number in family) == list(range(len(sequences)))
    for family in groups:
        assert len({tuple(sequences[number][:2]) for number in family}) == 1
        assert sum(len(sequences[number]) for number in family) <= max_tokens
    heads = [sequences[family[0]][:2] for family in groups]
    if sum(map(len, sequences)) <= max_tokens:
        assert len(groups) == len({tuple(head) for head in heads}), "a family is cut only for its size"


def test_answers_to_one_prompt_are_found_wherever_they_stand() -> None:
    one, other = list(range(100, 130)), list(range(200, 230))
    sequences = [[*one, 1], [*other, 2], [*one, 3, 4], [7], [*other, 5]]
    assert group_by_prefix(sequences, 1000) == [(3,), (0, 2), (1, 4)]
    batch = TrajectoryBatch.from_sequences(sequences)
    assert pack(batch, [3, 0, 2, 1, 4]).num_tokens == 1 + 30 + 1 + 2 + 30 + 1 + 1
