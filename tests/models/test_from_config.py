"""What a config asks for is what is built; the same config and seed give the same weights in every process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models import describe, load_policy, load_regression, load_tokenizer, save_pretrained
from rlhf_ray.models.actor import PackedPolicy
from rlhf_ray.models.regression import PackedRegression
from rlhf_ray.trajectories.packing import Packed


def tiny_config(**changes: Any) -> ModelConfig:
    make = {"shape": "llama-tiny", "tokenizer_from": "world", "seed": 1}
    return ModelConfig.model_validate({"make": make, "dtype": "fp32", **changes})


def same(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_policies_are_the_same_in_every_process() -> None:
    for config in (tiny_config(), tiny_config(lora={"rank": 2})):
        torch.manual_seed(0)
        first, state = load_policy(config, seed=5), torch.get_rng_state()
        torch.manual_seed(1)
        assert same(first, load_policy(config, seed=5))
        torch.manual_seed(0)
        assert torch.equal(state, torch.get_rng_state())
    assert not same(first, load_policy(tiny_config(lora={"rank": 2}), seed=6))


def test_reward_models_and_critics_share_the_backbone_of_the_policy_and_differ_in_their_heads() -> None:
    policy, reward, critic = load_policy(tiny_config()), load_regression(tiny_config(), "reward", seed=1), load_regression(
        tiny_config(), "critic", seed=2
    )  # fmt: skip
    assert same(policy.backbone, reward.backbone) and same(policy.backbone, critic.backbone)
    assert not torch.equal(reward.head.weight, critic.head.weight)
    assert same(reward, load_regression(tiny_config(), "reward", seed=1))
    assert reward.config.pad_token_id == load_tokenizer(tiny_config()).pad_token_id


def test_dtypes_and_heads_are_as_asked() -> None:
    assert load_policy(tiny_config(dtype="bf16")).model.dtype == torch.bfloat16
    critic = load_regression(tiny_config(dtype="bf16", head_init="zero"), "critic")
    assert critic.backbone.dtype == torch.bfloat16 and not critic.head.weight.any()
    assert critic.head.weight.dtype == torch.float32
    assert load_policy(tiny_config(gradient_checkpointing=True)).model.is_gradient_checkpointing


def test_models_made_in_four_bits_are_those_made_whole(tmp_path: Path) -> None:
    """Read into 4 bits from a directory that is gone afterwards; embeddings stay as they are."""
    for load in (load_policy, lambda config: load_regression(config, "critic", seed=2)):
        whole, quantized = (
            load(tiny_config(dtype="bf16")),
            load(tiny_config(dtype="bf16", quantization="nf4", lora={"rank": 2})),
        )
        assert "NF4 on 14 layers, LoRA rank 2 on 14 layers" in describe(quantized)
        embeddings = [model.backbone.embed_tokens.weight for model in (whole, quantized)]
        assert torch.equal(*embeddings) and embeddings[0].dtype == torch.bfloat16
    assert torch.equal(whole.head.weight, quantized.head.weight) and quantized.head.weight.requires_grad


def test_a_model_that_was_saved_comes_back(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tiny_config())
    packed = Packed(torch.tensor([5, 6, 7, 8, 9]), torch.tensor([0, 3, 5]), torch.tensor([0, 1, 2, 0, 1]))
    policy, reward = load_policy(tiny_config()), load_regression(tiny_config(), "reward", seed=1)
    save_pretrained(policy, tokenizer, tmp_path / "policy")
    save_pretrained(reward, tokenizer, tmp_path / "reward", metadata={"mean": 1.0, "std": 4.0})
    again = load_policy(ModelConfig(path=str(tmp_path / "policy"), dtype="fp32"))
    assert torch.equal(PackedPolicy(again)(packed).log_probs, PackedPolicy(policy)(packed).log_probs)
    scores = PackedRegression(reward.eval())(packed, "scores")
    loaded = ModelConfig(path=str(tmp_path / "reward"), dtype="fp32")
    assert torch.equal(PackedRegression(load_regression(loaded, "reward"))(packed, "scores"), scores)
    normalised = load_regression(loaded, "reward", normalize_reward=True).eval()
    torch.testing.assert_close(PackedRegression(normalised)(packed, "scores"), (scores - 1) / 4)
    assert load_tokenizer(loaded).get_vocab() == tokenizer.get_vocab()
    critic = load_regression(ModelConfig(path=str(tmp_path / "policy"), dtype="fp32", head_init="inv"), "critic")
    assert same(critic.backbone, policy.backbone) and "fresh, inv" in describe(critic)
    with pytest.raises(ModelLoadError, match="no score head"):
        load_regression(ModelConfig(path=str(tmp_path / "policy")), "critic")


def test_a_reward_model_whose_tokenizer_cannot_pad_gets_a_pad_token(
    tmp_path: Path, causal: Callable[..., PreTrainedModel], make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    """A policy's vocabulary stays as it is."""
    causal().save_pretrained(tmp_path / "base")
    make_tokenizer(pad=False).save_pretrained(tmp_path / "base")
    config = ModelConfig(path=str(tmp_path / "base"), dtype="fp32", head_init="hf")
    reward = load_regression(config, "reward")
    assert reward.config.pad_token_id == 48 and reward.get_input_embeddings().num_embeddings == 56
    assert load_policy(config).model.get_input_embeddings().num_embeddings == 48
    save_pretrained(reward, load_tokenizer(config), tmp_path / "reward")
    saved = ModelConfig(path=str(tmp_path / "reward"), dtype="fp32")
    assert load_tokenizer(saved).pad_token_id == 48
    assert same(load_regression(saved, "reward"), reward)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attention": "flash_attention_2"},
            "flash_attention_2 cannot be used here: it runs on GPUs only, not on the CPU",
        ),
        ({"lora": {"rank": 2, "targets": ["nonsense"]}}, "nonsense"),
    ],
)
def test_what_cannot_be_built_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        load_policy(tiny_config(**changes))
    with pytest.raises(ModelLoadError, match=message):
        load_regression(tiny_config(**changes), "critic")
    with pytest.raises(ModelLoadError, match="no mean and std"):
        load_regression(tiny_config(), "reward", normalize_reward=True)


def test_the_report_names_what_decides_the_numbers() -> None:
    assert describe(load_policy(tiny_config(lora={"rank": 2}))).startswith("policy LlamaForCausalLM, ")
    line = describe(load_regression(tiny_config(dtype="bf16"), "critic", seed=4))
    for part in ("critic LlamaModel", "32.2k parameters", "bf16", "attention sdpa", "head score fp32 (fresh, inv_sqrt, "
                 "seed 4)", "pad 0, eos 1", "no quantisation", "no LoRA", "not normalised"):  # fmt: skip
        assert part in line
