"""Packs side by side: the results are those of one after another, in their order, whatever fails; weights are shared, and
the process keeps its threads.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from rlhf_ray.models import make_model
from rlhf_ray.models.forward.parallel_packs import ParallelPacks, copy_sharing_weights
from rlhf_ray.models.regression import PackedRegression
from rlhf_ray.models.regression_loading import make_head, wrap_backbone
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import Packed, pack


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def module() -> nn.Module:
    backbone = make_model("llama-tiny", 128, seed=0, pad_token_id=0).base_model
    head = make_head(backbone, "inv_sqrt", 0)
    model = wrap_backbone(backbone, head, "reward", attention="auto", strict_attention=False, head_origin="fresh")
    return PackedRegression(model).eval()


def packs() -> list[Packed]:
    generator = torch.Generator().manual_seed(0)
    all_packs = []
    for number in range(9):
        lengths = torch.randint(1, 12 + 40 * (number % 3), (1 + number % 4,), generator=generator).tolist()
        sequences = [torch.randint(2, 128, (length,), generator=generator).tolist() for length in lengths]
        all_packs.append(pack(TrajectoryBatch.from_sequences(sequences), tuple(range(len(sequences)))))
    return all_packs


def scores(module: nn.Module, packed: Packed) -> torch.Tensor:
    result: torch.Tensor = module(packed, kind="scores")
    return result


def test_results_are_those_of_one_after_another(module: nn.Module) -> None:
    streams = ParallelPacks(2)
    with torch.no_grad():
        expected = [scores(module, packed) for packed in packs()]
    for _ in range(2):
        actual = streams.map(module, scores, packs())
        assert [len(one) for one in actual] == [len(one) for one in expected]
        torch.testing.assert_close(torch.cat(actual), torch.cat(expected), rtol=0, atol=1e-6)
    assert not any(one.requires_grad for one in actual)


def test_a_new_value_of_a_weight_is_seen(module: nn.Module) -> None:
    streams = ParallelPacks(2)
    before = torch.cat(streams.map(module, scores, packs()))
    with torch.no_grad():
        module.get_parameter("model.score.weight").mul_(2.0)
    torch.testing.assert_close(torch.cat(streams.map(module, scores, packs())), 2 * before)


def test_both_threads_run_each_on_one(module: nn.Module) -> None:
    seen: set[str] = set()

    def noted(module: nn.Module, packed: Packed) -> torch.Tensor:
        seen.add(f"{threading.current_thread().name} with {torch.get_num_threads()}")
        return scores(module, packed)

    ParallelPacks(2).map(module, noted, packs())
    assert seen == {"pack_0 with 1", "pack_1 with 1"}
    assert torch.get_num_threads() == 2


def test_what_fails_is_raised_and_the_next_pass_runs(module: nn.Module) -> None:
    streams = ParallelPacks(2)

    def fails_once(module: nn.Module, packed: Packed) -> torch.Tensor:
        if len(packed.last_tokens) == 2:
            raise ValueError("this pack")
        return scores(module, packed)

    with pytest.raises(ValueError, match="this pack"):
        streams.map(module, fails_once, packs())
    assert len(streams.map(module, scores, packs())) == 9


def test_the_copy_holds_no_weight_of_its_own(module: nn.Module) -> None:
    other = copy_sharing_weights(module)
    own, shared = dict(module.named_parameters()), dict(other.named_parameters())
    assert own.keys() == shared.keys() and all(own[name] is shared[name] for name in own)
    assert all(one is not another for one, another in zip(module.modules(), other.modules(), strict=True))
