"""An adapter that PEFT wrote is read with PEFT's own numbers, or refused by the option of its config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma3Config,
    GPT2Config,
    PreTrainedModel,
)

from rlhf_ray.cli.main import main
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.actor import Actor
from rlhf_ray.models.regression import SequenceRegression
from rlhf_ray.models.regression_loading import get_llm_for_sequence_regression
from rlhf_ray.models.save import save_adapter, save_pretrained
from rlhf_ray.models.weights.lora import adapted_layers

from .conftest import SIZES, VOCABULARY, random_model, word_tokenizer

IDS = torch.tensor([[5, 9, 12, 7, 1]])
NAMES = [f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(2) for part in "qv"]
UNSLOTH = (
    r"(?:.*?(?:vision|image|visual|language|text|model).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|o_proj)))"
)
READ: dict[str, dict[str, Any]] = {
    "all linear, by whole names": {},
    "two layers": {"target_modules": ["q_proj", "v_proj"]},
    "alpha by whole name": {"alpha_pattern": {NAMES[0]: 64, NAMES[3]: 2}},
    "alpha by regex": {"alpha_pattern": {r"^model\.layers\.1\..*down_proj": 64}},
    "rank by whole name": {"rank_pattern": {NAMES[0]: 7}, "target_modules": ["q_proj", "v_proj"]},
    "rank and alpha by last part": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"q_proj": 32}},
    "rslora": {"use_rslora": True, "alpha_pattern": {NAMES[0]: 64}},
    "whole names": {"target_modules": NAMES},
    "regex": {"target_modules": r".*\.(q_proj|v_proj)"},
    "regex from the start": {"target_modules": r"^model\.layers\..*\.(q_proj|v_proj)$"},
    "regex of one layer": {"target_modules": r"model\.layers\.1\..*_proj"},
    "regex of Unsloth": {"target_modules": UNSLOTH},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "one layer as a number": {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1},
    "one layer by pattern": {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
    "exclude last parts": {"exclude_modules": ["mlp", "down_proj"]},
    "exclude by regex": {"exclude_modules": r"model\.layers\.0\..*"},
    "exclude whole names": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": NAMES[:1]},
    "norms": {"modules_to_save": ["norm", "input_layernorm"]},
    "a whole MLP": {"modules_to_save": ["model.layers.1.mlp"]},
    "tokens": {"trainable_token_indices": [2, 9, 7]},
    "tokens by name": {"trainable_token_indices": {"embed_tokens": [3, 12]}},
    "initialised otherwise": {"init_lora_weights": "gaussian"},
    "no adapter but on one": {"target_modules": ["layers.0.mlp.down_proj"]},
}  # fmt: skip
ALSO_OF_POLICIES = (
    "alpha by whole name", "rank by whole name", "regex from the start", "one layer", "exclude by regex", "norms", "tokens",
)  # fmt: skip
"""What is tried on policies too, which have an output layer besides."""
OF_REWARDS: dict[str, dict[str, Any]] = {
    "head by name": {"modules_to_save": ["score"]},
    "embedding": {"modules_to_save": ["score", "embed_tokens"]},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
}
OF_POLICIES: dict[str, dict[str, Any]] = {
    "embedding and output layer": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "embedding": {"modules_to_save": ["embed_tokens"]},
    "LoRA on the output layer": {"target_modules": ["q_proj", "lm_head"], "alpha_pattern": {"lm_head": 32}},
    "LoRA on the embedding": {"target_modules": ["embed_tokens", "v_proj"]},
}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dora": ({"use_dora": True}, r"uses use_dora \(True\)"),
    "bias of LoRA": ({"lora_bias": True}, r"uses lora_bias \(True\)"),
    "all biases": ({"bias": "all"}, r"uses bias \('all'\)"),
    "biases of layers": ({"bias": "lora_only"}, r"uses bias \('lora_only'\)"),
    "parameters": ({"target_parameters": ["q_proj.weight"], "target_modules": []}, r"uses target_parameters \(\["),
    "pissa": ({"init_lora_weights": "pissa"}, r"uses init_lora_weights \('pissa'\)"),
    "olora": ({"init_lora_weights": "olora"}, r"uses init_lora_weights \('olora'\)"),
    "copied layers": ({"layer_replication": [[0, 2], [1, 2]]}, r"uses layer_replication \(\["),
    "activated LoRA": ({"alora_invocation_tokens": [5, 9]}, r"uses alora_invocation_tokens \(\[5, 9\]\)"),
}


def shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.eval()


def write(
    directory: Path, task: str, model: PreTrainedModel | None = None, rows: int | None = None, **options: Any
) -> tuple[Path, Tensor]:
    """An adapter of PEFT over a base on disk, whose weights have moved; and what PEFT computes with it.

    The base is ``model``, whose embedding is resized to ``rows`` before training.
    """
    (random_model("llama") if model is None else model).save_pretrained(directory / "base")
    auto: Any = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
    torch.manual_seed(1)
    labels = {"num_labels": 1} if task == "SEQ_CLS" else {}
    base = auto.from_pretrained(directory / "base", attn_implementation="eager", **labels)
    if rows is not None:
        base.resize_token_embeddings(rows, mean_resizing=False)
    config = LoraConfig(**{"task_type": task, "r": 4, "lora_alpha": 8, "target_modules": "all-linear", **options})
    theirs = shaken(get_peft_model(base, config))
    theirs.save_pretrained(directory / "adapter")
    return directory / "adapter", numbers(theirs)


@torch.no_grad()
def numbers(theirs: nn.Module) -> Tensor:
    return theirs(input_ids=IDS).logits[0]


def reward(directory: Path, **options: Any) -> SequenceRegression:
    return get_llm_for_sequence_regression(str(directory), "reward", param_dtype="fp32", **options).eval()


@torch.no_grad()
def ours(model: Actor | SequenceRegression) -> Tensor:
    if isinstance(model, Actor):
        return model.eval()(IDS, return_output=True).logits[0]
    return model(IDS)


def close(one: Tensor, other: Tensor) -> None:
    assert one.shape == other.shape
    assert float((one - other).abs().max()) <= 2e-6 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("case", READ | OF_REWARDS)
def test_a_reward_model_scores_as_in_peft_and_merged(tmp_path: Path, case: str) -> None:
    adapter, expected = write(tmp_path, "SEQ_CLS", **(READ | OF_REWARDS)[case])
    model = reward(adapter)
    close(ours(model), expected)
    if case in OF_REWARDS or case in ALSO_OF_POLICIES:
        save_pretrained(model, None, tmp_path / "merged")
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", attn_implementation="eager")
        close(numbers(theirs.eval()), expected)


@pytest.mark.parametrize("case", (*ALSO_OF_POLICIES, *OF_POLICIES))
def test_a_policy_has_the_logits_of_peft_and_merged(tmp_path: Path, case: str) -> None:
    adapter, expected = write(tmp_path, "CAUSAL_LM", **(READ | OF_POLICIES)[case])
    model = Actor(str(adapter), param_dtype="fp32")
    close(ours(model), expected)
    save_pretrained(model, None, tmp_path / "merged")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", attn_implementation="eager")
    close(numbers(theirs.eval()), expected)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused_by_the_option(tmp_path: Path, case: str) -> None:
    options, message = REFUSED[case]
    adapter, _ = write(tmp_path, "SEQ_CLS", **options)
    with pytest.raises(ModelLoadError, match=message + r".*merge_and_unload"):
        reward(adapter)


def headed(family: str = "llama") -> PreTrainedModel:
    """A classifier, whose head is on disk."""
    config = random_model(family).config
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config)


def test_lora_on_the_head_is_merged_into_it(tmp_path: Path) -> None:
    """What PEFT does with all-linear where the config has no task_type, as OpenRLHF trains by default."""
    adapter, expected = write(tmp_path, "SEQ_CLS", headed(), task_type=None, alpha_pattern={"score": 64})
    assert any("score.lora_A" in name for name in load_file(adapter / "adapter_model.safetensors"))
    model = reward(adapter)
    close(ours(model), expected)
    assert model.head.weight.requires_grad and not hasattr(model.head, "lora_A")


def test_lora_on_a_head_that_is_nowhere_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter, _ = write(tmp_path, "SEQ_CLS", task_type=None)
    message = r"has LoRA on its head \(target_modules\), but neither it nor .*base holds the head itself"
    with pytest.raises(ModelLoadError, match=message):
        reward(adapter)
    word_tokenizer().save_pretrained(tmp_path / "base")
    assert main(["export", str(adapter), str(tmp_path / "out")]) == 2  # and not a language model without a word
    assert "has LoRA on its head (target_modules)" in capsys.readouterr().err
    assert "fresh" in reward(adapter, init_value_head=True).head_origin


@pytest.mark.parametrize("rows", [64, 40])
def test_an_embedding_of_another_size_comes_with_the_adapter(tmp_path: Path, rows: int) -> None:
    """PEFT saves it by itself when the vocabulary was changed before training, as TRL does for a pad token."""
    adapter, expected = write(tmp_path, "CAUSAL_LM", rows=rows, target_modules=["q_proj"])
    policy = Actor(str(adapter), param_dtype="fp32")
    close(ours(policy), expected)
    save_pretrained(policy, None, tmp_path / "merged")
    close(numbers(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected)
    (tmp_path / "reward").mkdir()
    adapter, expected = write(tmp_path / "reward", "SEQ_CLS", rows=rows, target_modules=["q_proj"])
    close(ours(reward(adapter)), expected)


TIED = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trainable_token_indices": [2, 9]}, None),
        ({"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, None),
        (
            {"modules_to_save": ["embed_tokens"]},
            r"trained model.embed_tokens.weight apart.*ensure_weight_tying",
        ),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save .*trained lm_head.weight apart"),
        (
            {"modules_to_save": ["lm_head", "embed_tokens"]},
            r"trained model.embed_tokens.weight and lm_head.weight apart",
        ),
        ({"target_modules": ["q_proj", "lm_head"]}, r"target_modules .* holds lm_head, which shares its weight"),
        (
            {"target_modules": ["q_proj", "embed_tokens"]},
            r"target_modules .* holds model.embed_tokens, which shares",
        ),
    ],
)
def test_a_weight_that_two_layers_share(tmp_path: Path, options: dict[str, Any], message: str | None) -> None:
    adapter, expected = write(tmp_path, "CAUSAL_LM", random_model("llama", **TIED), **options)
    if message is None:
        policy = Actor(str(adapter), param_dtype="fp32")
        close(ours(policy), expected)
        save_pretrained(policy, None, tmp_path / "merged")
        close(numbers(AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()), expected)
    else:
        with pytest.raises(ModelLoadError, match=message):
            Actor(str(adapter), param_dtype="fp32")


def gpt2() -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, initializer_range=0.2
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize("targets", ["all-linear", ["c_attn"], r"transformer\.h\.1\..*c_(fc|proj)"])
def test_layers_with_a_transposed_weight(tmp_path: Path, targets: Any) -> None:
    """Conv1D of GPT-2: adapters of PEFT, and our own, trained, merged, and read by PEFT."""
    adapter, expected = write(tmp_path, "SEQ_CLS", gpt2(), target_modules=targets, fan_in_fan_out=True)
    model = reward(adapter)
    close(ours(model), expected)
    save_pretrained(model, None, tmp_path / "merged")
    close(numbers(AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()), expected)
    own = Actor(str(tmp_path / "base"), param_dtype="fp32", lora_rank=2, target_modules=targets)
    shaken(own)
    save_adapter(own, None, tmp_path / "own")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    close(numbers(PeftModel.from_pretrained(base, tmp_path / "own").eval()), ours(own))
    assert set(adapted_layers(own.model)) and all(".h." in name for name in adapted_layers(own.model))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_an_adapter_brought_whole_is_saved_with_it_again(tmp_path: Path, family: str) -> None:
    options = {"modules_to_save": ["score", "norm"], "trainable_token_indices": [2, 9], "target_modules": ["q_proj"]}
    adapter, expected = write(tmp_path, "SEQ_CLS", random_model(family), **options)
    model = reward(adapter)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert {"model.norm.weight", "model.embed_tokens.weight"} <= frozen
    save_adapter(model, None, tmp_path / "again")
    close(ours(reward(tmp_path / "again")), expected)
    base = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=1, attn_implementation="eager"
    )
    close(numbers(PeftModel.from_pretrained(base, tmp_path / "again").eval()), expected)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"trainable_token_indices": [2, 9], "target_modules": ["q_proj"]}),
        ("llama", {"modules_to_save": ["lm_head"], "ensure_weight_tying": True, "target_modules": ["q_proj"]}),
        ("gpt2", {"trainable_token_indices": [2, 9], "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    ],
)
def test_a_shared_weight_that_an_adapter_brought_is_saved_with_it_again(
    tmp_path: Path, family: str, options: dict[str, Any]
) -> None:
    base = gpt2() if family == "gpt2" else random_model(family, **TIED)
    adapter, expected = write(tmp_path, "CAUSAL_LM", base, **options)
    save_adapter(Actor(str(adapter), param_dtype="fp32"), None, tmp_path / "again")
    close(ours(Actor(str(tmp_path / "again"), param_dtype="fp32")), expected)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    close(numbers(PeftModel.from_pretrained(theirs, tmp_path / "again").eval()), expected)


def test_a_policys_adapter_becomes_a_reward_model_without_its_output_layer(tmp_path: Path) -> None:
    options = {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}
    adapter, _ = write(tmp_path, "CAUSAL_LM", **options)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = PeftModel.from_pretrained(base, adapter).eval()
    model = reward(adapter, init_value_head=True)
    with torch.no_grad():
        hidden = theirs(input_ids=IDS, output_hidden_states=True).hidden_states[-1][:, -1]
        close(ours(model), model.head(hidden))


def test_layers_that_the_base_lacks_are_refused_by_the_option(tmp_path: Path) -> None:
    adapter, _ = write(tmp_path, "SEQ_CLS")
    random_model("mixtral").save_pretrained(tmp_path / "base")
    with pytest.raises(
        ModelLoadError, match=r"LoRA on model.layers.0.mlp.down_proj \(target_modules\), which is no linear"
    ):
        reward(adapter)


def test_only_the_part_that_reads_text_is_adapted(tmp_path: Path) -> None:
    """A vision tower would get adapters that never learn; SigLIP's probe, which is 3-D, is no expert."""
    text = {**SIZES, "sliding_window": 5, "query_pre_attn_scalar": 8}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
              "patch_size": 14, "vision_use_head": True}  # fmt: skip
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4, pad_token_id=0, eos_token_id=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    for targets in (None, ["q_proj", "v_proj"], r".*\.(q_proj|v_proj)"):
        policy = Actor(str(tmp_path / "base"), param_dtype="fp32", lora_rank=2, target_modules=targets)
        model = reward(tmp_path / "base", init_value_head=True, lora_rank=2, target_modules=targets)
        for adapted in (adapted_layers(policy.model), adapted_layers(model)):
            assert len(adapted) == (14 if targets is None else 4)
            assert all("language_model.layers." in name for name in adapted)
        save_pretrained(policy, None, tmp_path / "merged")
