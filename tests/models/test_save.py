"""What is written is plain Hugging Face: transformers reads it back with equal scores, under the names it uses itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    Glm4MoeConfig,
    Olmo2Config,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    pipeline,
)

from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.models.disk_names import to_disk_names
from rlhf_ray.models.regression import PackedRegression, SequenceRegression
from rlhf_ray.models.regression_loading import get_llm_for_sequence_regression
from rlhf_ray.models.save import save_pretrained
from rlhf_ray.models.weights.lora import add_lora
from rlhf_ray.trajectories.packing import Packed

from .conftest import SIZES, save_random, shake_adapters, word_tokenizer

Make = Callable[..., PreTrainedModel]


def fresh_reward(directory: Path, causal: Make, family: str = "llama", **arguments: object) -> SequenceRegression:
    causal(family).save_pretrained(directory)
    return get_llm_for_sequence_regression(
        str(directory), "reward", **{"param_dtype": "fp32", "init_value_head": True, **arguments}
    ).eval()


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "model.safetensors")


def test_a_policy_comes_back_bit_for_bit(tmp_path: Path, family: str, causal: Make, packed: Packed) -> None:
    """Under the names that transformers itself would have written: experts one by one, tied weights once."""
    causal(family).save_pretrained(tmp_path / "theirs")
    save_pretrained(Actor(causal(family), param_dtype="fp32"), None, tmp_path / "mine")
    mine, theirs = tensors_of(tmp_path / "mine"), tensors_of(tmp_path / "theirs")
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    again = Actor(str(tmp_path / "mine"), param_dtype="fp32")
    expected = PackedPolicy(Actor(causal(family), param_dtype="fp32"))(packed).log_probs
    assert torch.equal(PackedPolicy(again)(packed).log_probs, expected)
    config = json.loads((tmp_path / "mine" / "config.json").read_text())
    assert config["dtype"] == "float32" and config["architectures"] == [type(again.model).__name__]


def test_a_mixture_loaded_from_disk_keeps_its_names(tmp_path: Path, causal: Make) -> None:
    causal("mixtral").save_pretrained(tmp_path / "theirs")
    actor = Actor(str(tmp_path / "theirs"), param_dtype="fp32")
    assert any(name.endswith("experts.gate_up_proj") for name, _ in actor.model.named_parameters())
    assert dict(to_disk_names(actor.model)).keys() == tensors_of(tmp_path / "theirs").keys()
    reward = get_llm_for_sequence_regression(
        str(tmp_path / "theirs"), "reward", param_dtype="fp32", init_value_head=True
    )
    save_pretrained(reward, None, tmp_path / "mine")
    expected = tensors_of(tmp_path / "theirs").keys() - {"lm_head.weight"} | {"score.weight"}
    assert tensors_of(tmp_path / "mine").keys() == expected


def test_transformers_reads_a_reward_model_with_equal_scores(
    tmp_path: Path, family: str, causal: Make, sequences: list[Tensor], packed: Packed,
    make_tokenizer: Callable[..., PreTrainedTokenizerFast],
) -> None:  # fmt: skip
    reward = fresh_reward(tmp_path / "base", causal, family)
    save_pretrained(reward, make_tokenizer(), tmp_path / "reward", metadata={"mean": 0.5, "std": 2.0})
    theirs, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "reward", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        expected = torch.cat([theirs(input_ids=sequence[None]).logits[:, 0] for sequence in sequences])
        scores = PackedRegression(reward)(packed, "scores")
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    config = json.loads((tmp_path / "reward" / "config.json").read_text())
    wanted = {"problem_type": "regression", "pad_token_id": 0, "value_head_prefix": "score", "mean": 0.5, "std": 2.0}
    assert wanted.items() <= config.items() and theirs.config.num_labels == 1
    again = get_llm_for_sequence_regression(str(tmp_path / "reward"), "reward", param_dtype="fp32").eval()
    with torch.no_grad():
        assert torch.equal(PackedRegression(again)(packed, "scores"), scores)


def test_the_text_classification_pipeline_gives_the_raw_score(
    tmp_path: Path, causal: Make, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    """A single label without problem type would pass through a sigmoid."""
    reward, tokenizer = fresh_reward(tmp_path / "base", causal), make_tokenizer()
    save_pretrained(reward, tokenizer, tmp_path / "reward")
    texts = ["w7 w9 w30 </s>", "w5 w5 </s>"]
    predictions = pipeline("text-classification", str(tmp_path / "reward"), device="cpu")(texts)
    expected = [float(reward(torch.tensor([tokenizer(text)["input_ids"]])).detach()) for text in texts]
    assert [row["score"] for row in predictions] == pytest.approx(expected, abs=1e-5)


def test_the_name_of_the_head(tmp_path: Path, causal: Make) -> None:
    """``score`` on disk with its prefix as metadata; under another name where that is asked for."""
    reward = fresh_reward(tmp_path / "base", causal, value_head_prefix="worth")
    assert "worth.weight" in dict(reward.named_parameters())
    save_pretrained(reward, None, tmp_path / "plain")
    save_pretrained(reward, None, tmp_path / "openrlhf", head_prefix="worth")
    assert "score.weight" in tensors_of(tmp_path / "plain") and "worth.weight" not in tensors_of(tmp_path / "plain")
    assert "worth.weight" in tensors_of(tmp_path / "openrlhf") and "score.weight" not in tensors_of(
        tmp_path / "openrlhf"
    )
    for directory in ("plain", "openrlhf"):
        assert json.loads((tmp_path / directory / "config.json").read_text())["value_head_prefix"] == "worth"
        again = get_llm_for_sequence_regression(str(tmp_path / directory), "reward", param_dtype="fp32")
        assert torch.equal(again.head.weight, reward.head.weight)


def test_a_bias_is_kept_as_metadata(tmp_path: Path, causal: Make, packed: Packed) -> None:
    reward = fresh_reward(tmp_path / "base", causal)
    reward.score_bias = 0.75
    save_pretrained(reward, None, tmp_path / "reward")
    again = get_llm_for_sequence_regression(str(tmp_path / "reward"), "reward", param_dtype="fp32").eval()
    assert again.score_bias == 0.75
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    ids = packed.token_ids[None, :7]
    torch.testing.assert_close(again(ids), theirs(ids).logits[:, 0] + 0.75, atol=1e-5, rtol=1e-5)


def test_olmoe_is_read_by_the_auto_class_where_this_project_is_imported(
    tmp_path: Path, packed: Packed, sequences: list[Tensor], logged: pytest.LogCaptureFixture
) -> None:
    """transformers maps OLMo2 itself, and that class stays."""
    assert "transformers" in AutoModelForSequenceClassification._model_mapping[Olmo2Config].__module__
    for family in ("olmoe", "olmo2"):
        reward = get_llm_for_sequence_regression(
            str(save_random(family, tmp_path / "base")), "reward", param_dtype="fp32", init_value_head=True
        ).eval()
        save_pretrained(reward, None, tmp_path / family)
        theirs, info = AutoModelForSequenceClassification.from_pretrained(
            tmp_path / family, output_loading_info=True, attn_implementation="eager"
        )
        assert not info["missing_keys"] and not info["unexpected_keys"]
        with torch.no_grad():
            expected = torch.cat([theirs(input_ids=sequence[None]).logits[:, 0] for sequence in sequences])
            torch.testing.assert_close(PackedRegression(reward)(packed, "scores"), expected, atol=1e-5, rtol=1e-5)
        assert ("itself has no sequence classification" in logged.text) == (family == "olmoe") and not logged.clear()
    assert json.loads((tmp_path / "olmoe/config.json").read_text())["architectures"] == [
        "OlmoeForSequenceClassification"
    ]


def test_architectures_that_transformers_cannot_map_are_ours_only(
    tmp_path: Path, packed: Packed, logged: pytest.LogCaptureFixture
) -> None:
    config = Glm4MoeConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
        first_k_dense_replace=1, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    reward = get_llm_for_sequence_regression(str(tmp_path / "base"), "reward", param_dtype="fp32", init_value_head=True)
    save_pretrained(reward, None, tmp_path / "reward")
    assert "no sequence classification for glm4_moe: only this project reads it" in logged.text
    again = get_llm_for_sequence_regression(str(tmp_path / "reward"), "reward", param_dtype="fp32")
    assert torch.equal(PackedRegression(again)(packed, "scores"), PackedRegression(reward)(packed, "scores"))


@pytest.fixture
def logged(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    from rlhf_ray.console import get_logger

    monkeypatch.setattr(get_logger(), "propagate", True)
    caplog.set_level("INFO", logger=get_logger().name)
    return caplog


def test_adapters_are_merged(tmp_path: Path, causal: Make, packed: Packed) -> None:
    """Under the names of the plain model; merged and unmerged scores and log-probs agree."""
    actor = Actor(causal("qwen3"), param_dtype="fp32", lora_rank=3, lora_alpha=5)
    shake_adapters(actor)
    save_pretrained(actor, None, tmp_path / "actor")
    plain = Actor(causal("qwen3"), param_dtype="fp32")
    assert dict(to_disk_names(actor.model)).keys() == dict(to_disk_names(plain.model)).keys()
    again = PackedPolicy(Actor(str(tmp_path / "actor"), param_dtype="fp32"))(packed).log_probs
    torch.testing.assert_close(again, PackedPolicy(actor)(packed).log_probs, atol=1e-5, rtol=1e-5)
    assert float((again - PackedPolicy(plain)(packed).log_probs).detach().abs().max()) > 1e-2
    reward = fresh_reward(tmp_path / "base", causal)
    add_lora(reward.backbone, rank=2, alpha=4, targets=["q_proj", "down_proj"])
    shake_adapters(reward)
    save_pretrained(reward, None, tmp_path / "reward")
    merged = get_llm_for_sequence_regression(str(tmp_path / "reward"), "reward", param_dtype="fp32").eval()
    scores = PackedRegression(reward)(packed, "scores")
    torch.testing.assert_close(PackedRegression(merged)(packed, "scores"), scores, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "gemma2", "llama"])
def test_names_of_groups_are_those_of_the_whole(causal: Make, name: str) -> None:
    """An engine hands over one layer at a time."""
    model = Actor(causal(name), param_dtype="fp32").model
    whole = dict(to_disk_names(model))
    layers: dict[str, list[tuple[str, Tensor]]] = {}
    for live, tensor in model.named_parameters():
        layer = ".".join(live.split(".")[:3]) if ".layers." in live else live
        layers.setdefault(layer, []).append((live, tensor))
    grouped = [pair for group in layers.values() for pair in to_disk_names(model, group)]
    assert len(grouped) == len(whole) and all(torch.equal(tensor, whole[name]) for name, tensor in grouped)


def test_given_weights_are_written_instead_of_the_models_own(tmp_path: Path, causal: Make) -> None:
    """What rank 0 gathered: the model itself may hold parts only."""
    actor = Actor(causal(), param_dtype="fp32")
    state = {name: tensor.detach().bfloat16() + 1 for name, tensor in to_disk_names(actor.model)}
    save_pretrained(actor, None, tmp_path, state=state)
    written = tensors_of(tmp_path)
    assert all(torch.equal(written[name], state[name]) for name in state)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"


def test_large_models_are_written_in_shards(tmp_path: Path, causal: Make, packed: Packed) -> None:
    actor = Actor(causal(), param_dtype="fp32")
    save_pretrained(actor, None, tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    again = Actor(str(tmp_path), param_dtype="fp32")
    assert torch.equal(PackedPolicy(again)(packed).log_probs, PackedPolicy(actor)(packed).log_probs)
    sharded = get_llm_for_sequence_regression(str(tmp_path), "reward", param_dtype="fp32", init_value_head=True)
    save_pretrained(sharded, None, tmp_path / "reward", max_shard_size="20KB")
    loaded = get_llm_for_sequence_regression(str(tmp_path / "reward"), "reward", param_dtype="fp32")
    assert torch.equal(loaded.head.weight, sharded.head.weight)


@pytest.mark.parametrize("model_type", ["gemma3", "qwen2_5_vl"])
def test_a_reward_model_of_images_and_text_is_read_again(model_type: str, tmp_path: Path) -> None:
    """transformers gives names that begin with ``model`` to the text part of some of these."""
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = SIZES | ({"sliding_window": 5} if model_type == "gemma3" else {"rope_parameters": rope})
    vision = {
        "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
        "patch_size": 14, "vision_use_head": False, "depth": 1, "num_heads": 2, "out_hidden_size": 32,
    }  # fmt: skip
    config = AutoConfig.for_model(model_type, text_config=text, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path / "seeing")
    model = get_llm_for_sequence_regression(
        str(tmp_path / "seeing"), "reward", param_dtype="fp32", init_value_head=True
    )
    save_pretrained(model, word_tokenizer(), tmp_path / "out")
    again = get_llm_for_sequence_regression(str(tmp_path / "out"), "reward", param_dtype="fp32")
    ids = torch.arange(3, 11)[None]
    torch.testing.assert_close(again.eval()(ids), model.eval()(ids), atol=0.0, rtol=0.0)
