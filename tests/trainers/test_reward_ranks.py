"""Two ranks without Ray: the same loss curve at every ZeRO stage as one rank has, and held-out scores equal to the last bit."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.algorithms.reward_losses import RewardLoss
from rlhf_ray.config.sections.models import MakeConfig, ModelConfig
from rlhf_ray.data.batches import make_pair_batch
from rlhf_ray.models import load_tokenizer, save_pretrained
from rlhf_ray.models.from_config import load_regression
from rlhf_ray.trainers.supervised import reward_evaluation

from . import reward_rank_program as program
from .reward_runs import config_of

pytestmark = pytest.mark.early

Measured = list[dict[str, Any]]


def model_in(directory: Path) -> None:
    model = ModelConfig(make=MakeConfig(shape="llama-tiny", tokenizer_from="world"), head_init="inv_sqrt", dtype="fp32")
    save_pretrained(load_regression(model, "reward", seed=4), load_tokenizer(model), directory / "model")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("ranks")
    torch.set_num_threads(1)
    model_in(place)
    return place


@pytest.fixture(scope="module")
def two(directory: Path) -> Measured:
    """What both ranks measured."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [
        subprocess.Popen([sys.executable, program.__file__, str(rank), "2", str(port), str(directory)])
        for rank in (0, 1)
    ]
    assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
    return [json.loads((directory / f"measured-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(directory: Path) -> dict[str, Any]:
    return program.measure(0, 1, directory, ((0, "fp32"),))["0 fp32"]


def curve_of(measured: Measured, stage: str) -> list[float]:
    return [sum(pair) for pair in zip(*(rank[stage]["losses"] for rank in measured), strict=True)]


@pytest.mark.parametrize("zero", program.STAGES)
def test_the_loss_curve_is_that_of_one_rank(zero: int, one: dict[str, Any], two: Measured) -> None:
    curve = curve_of(two, f"{zero} fp32")
    assert curve == pytest.approx(one["losses"], abs=1e-4)
    assert max(curve) - min(curve) > 0.01, "a curve that moves"


def test_a_model_in_shards_trains_in_half_precision_beside_its_head(one: dict[str, Any], two: Measured) -> None:
    assert curve_of(two, "3 bf16") == pytest.approx(one["losses"], abs=0.02)


def test_held_out_scores_are_the_same_bits_for_any_number_of_ranks(one: dict[str, Any], two: Measured) -> None:
    scores = two[0]["0 fp32"]["scores"] | two[1]["0 fp32"]["scores"]
    assert len(two[0]["0 fp32"]["scores"]) < len(scores) == 2 * program.HELD_OUT
    assert scores == one["scores"]


def test_figures_hardly_depend_on_the_token_budget(tmp_path: Path) -> None:
    """Counts are the same; means are within 1e-6."""
    from rlhf_ray.actors.groups import RewardGroup
    from rlhf_ray.actors.ranks import InProcessRanks
    from rlhf_ray.actors.workers.reward import RewardSetup, RewardWorker
    from rlhf_ray.data.load import load_pairs

    config = config_of(tmp_path)
    reward = RewardGroup(InProcessRanks("reward", RewardWorker()))
    reward.setup(RewardSetup(config.reward, seed=0), timeout_s=60.0).result()
    pairs = load_pairs(config.data, load_tokenizer(config.reward.model), 0).held_out
    longest = int(make_pair_batch(pairs).lengths.max()) * 2
    evaluations = []
    for budget in (longest, 300, 1000, 100_000):
        held_out = reward_evaluation.HeldOutPairs(reward, pairs, RewardLoss(), budget)
        evaluations.append(held_out.figures())
    for figures in evaluations[1:]:
        assert figures == pytest.approx(evaluations[0], abs=1e-6)
        for count in ("pairs", "accuracy", "tie_rate"):
            assert figures[f"evaluation/{count}"] == evaluations[0][f"evaluation/{count}"]
