"""The ledger: each step once, each prompt once an epoch, and nothing past a restored step."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.data.order import Part, ShuffledOrder
from rlhf_ray.errors import IntegrityError
from rlhf_ray.runs import Ledger, LedgerEntry
from rlhf_ray.storage import JsonLines


def test_steps_follow_each_other_without_gap_or_repetition(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl", attempt=3)
    ledger.append(1, [5, 3])
    for step in (1, 3, 0):
        with pytest.raises(IntegrityError, match=f"step {step} cannot follow step 1"):
            ledger.append(step, [4])
    ledger.append(2, [4])
    assert ledger.entries() == [LedgerEntry(1, 3, (5, 3)), LedgerEntry(2, 3, (4,))]
    assert Ledger(tmp_path / "ledger.jsonl").last_step == 2


def test_lines_past_the_restored_step_are_void_and_kept_apart(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for step in range(1, 5):
        ledger.append(step, [step])
    assert ledger.void_after(2) == 2
    assert [entry.step for entry in ledger.entries()] == [1, 2]
    assert [line["step"] for line in JsonLines(tmp_path / "ledger.void.jsonl").read()] == [3, 4]
    ledger.append(3, [33])
    assert [entry.prompt_ids for entry in ledger.entries()] == [(1,), (2,), (33,)]


def test_a_ledger_that_ends_before_the_checkpoint_is_an_error(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(1, [1])
    with pytest.raises(IntegrityError, match="ends at step 1, but the checkpoint is of step 2"):
        ledger.void_after(2)


def test_a_job_without_a_ledger_has_nothing_to_void(tmp_path: Path) -> None:
    assert Ledger(tmp_path / "ledger.jsonl").void_after(7) == 0
    assert list(tmp_path.iterdir()) == []


@given(
    size=st.integers(1, 6),
    epochs=st.integers(0, 3),
    rest=st.integers(0, 5),
    per_step=st.integers(1, 7),
    seed=st.randoms(use_true_random=False),
)
def test_any_permutation_stream_in_any_steps_counts_its_whole_epochs(
    tmp_path_factory: pytest.TempPathFactory, size: int, epochs: int, rest: int, per_step: int, seed: object
) -> None:
    stream = [prompt for _ in range(epochs + 1) for prompt in seed.sample(range(size), size)]  # type: ignore[attr-defined]
    stream = stream[: epochs * size + min(rest, size - 1)]
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "ledger.jsonl")
    lines = [stream[start : start + per_step] for start in range(0, len(stream), per_step)]
    ledger._lines.extend({"step": step, "attempt": 1, "prompt_ids": ids} for step, ids in enumerate(lines, 1))
    assert ledger.verify(range(size)) == epochs


def test_a_prompt_used_twice_in_an_epoch_is_named_with_both_steps(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(1, [0, 1, 2])
    ledger.append(2, [2, 1])
    ledger.append(3, [2, 0])
    with pytest.raises(IntegrityError, match="prompt 2 was used once too often in epoch 2, in step 2 and in step 3"):
        ledger.verify([0, 1, 2])


def test_the_end_of_one_epoch_may_meet_the_start_of_the_next_in_one_step(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(1, [0, 1])
    ledger.append(2, [2, 2])
    assert ledger.verify([0, 1, 2]) == 1


def test_a_prompt_that_is_not_in_the_data_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.append(1, [7])
    with pytest.raises(IntegrityError, match="step 1 used prompt 7, which is not in the data"):
        ledger.verify([0, 1])


WEIGHTED = st.builds(Part.weighted, st.integers(1, 6), st.sampled_from([0.3, 0.5, 1.0, 1.5, 2.0]))


@given(parts=st.lists(WEIGHTED, min_size=1, max_size=3), count=st.integers(0, 40), per_step=st.integers(1, 7))
def test_the_stream_of_a_mixture_is_accounted_for_and_a_prompt_too_much_is_found(
    tmp_path_factory: pytest.TempPathFactory, parts: list[Part], count: int, per_step: int
) -> None:
    order = ShuffledOrder(0, parts)
    stream, prompts = order.take(count), range(sum(part.size for part in parts))
    ledger = Ledger(tmp_path_factory.mktemp("ledger") / "ledger.jsonl")
    lines = [stream[start : start + per_step] for start in range(0, len(stream), per_step)]
    ledger._lines.extend({"step": step, "attempt": 1, "prompt_ids": ids} for step, ids in enumerate(lines, 1))
    assert ledger.verify(prompts, parts) == order.epoch
    due = -(-parts[0].per_epoch // parts[0].size)
    if due < order.epoch_size:
        wrong = Ledger(tmp_path_factory.mktemp("ledger") / "ledger.jsonl")
        wrong.append(1, [0] * (due + 1))
        with pytest.raises(IntegrityError, match="prompt 0 was used once too often in epoch 1"):
            wrong.verify(prompts, parts)
