"""The balance of routers that a reward model's loss reads: transformers' own, over packs; and it trains the routers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from rlhf_ray.actors.workers.trained_reward import TrainedRewardSetup, TrainedRewardWorker
from rlhf_ray.algorithms.reward_losses import RewardLoss
from rlhf_ray.config.sections.engine import EngineConfig, OptimizerConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.errors import RequestError
from rlhf_ray.models.regression import PackedRegression
from rlhf_ray.models.regression_loading import get_llm_for_sequence_regression
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import Packed

Make = Callable[..., PreTrainedModel]


def reward_model(causal: Make, family: str, directory: Path) -> PackedRegression:
    causal(family).save_pretrained(directory)
    options = {"param_dtype": "fp32", "attn_implementation": "sdpa", "init_value_head": True}
    return PackedRegression(get_llm_for_sequence_regression(str(directory), "reward", **options))


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_the_balance_of_a_pack_is_that_of_its_sequences_alone(
    family: str, causal: Make, sequences: list[Tensor], packed: Packed, tmp_path: Path
) -> None:
    module = reward_model(causal, family, tmp_path)
    outputs = module(packed, kind="routed_scores")
    torch.testing.assert_close(outputs.scores, module(packed, kind="scores"), rtol=0, atol=1e-6)
    alone = causal(family)
    layers = [alone(input_ids=sequence[None], output_router_logits=True).router_logits for sequence in sequences]
    joined = tuple(torch.cat(layer) for layer in zip(*layers, strict=True))
    config = alone.config
    theirs = load_balancing_loss_func(joined, joined[0].shape[1], config.num_experts_per_tok)
    torch.testing.assert_close(outputs.router_balance, theirs, rtol=0, atol=1e-5)


def test_a_model_without_routers_is_refused(causal: Make, packed: Packed, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="LlamaModel has no routers"):
        reward_model(causal, "llama", tmp_path)(packed, kind="routed_scores")


def test_training_on_the_balance_evens_the_use_of_experts(
    causal: Make, make_tokenizer: Callable[..., PreTrainedTokenizerFast], tmp_path: Path
) -> None:
    causal("mixtral").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    optimizer = OptimizerConfig(learning_rate=0.02)
    role = RoleConfig(
        model=ModelConfig(path=str(tmp_path), dtype="fp32", head_init="inv_sqrt"),
        engine=EngineConfig(optimizer=optimizer),
    )
    worker = TrainedRewardWorker()
    worker.setup(TrainedRewardSetup(role, seed=0, total_updates=12, routers=True))
    batch = TrajectoryBatch.from_sequences([[3, 4, 5], [3, 4, 6], [7, 8], [7, 9]])
    loss, balances = RewardLoss(router_balance=1.0), []
    for _ in range(12):
        report = worker.accumulate(batch, [(0, 1, 2, 3), ()], loss, 2)
        total, count = report.metrics["loss/router_balance"]
        balances.append(total / count)
        assert report.finite and report.metrics["padding/share"][0] == 2.0
        worker.apply(False)
    assert balances[-1] < balances[0]
