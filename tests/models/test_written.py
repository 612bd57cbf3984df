"""Nothing that a model holds is lost or changed on the way to disk; the config is the one that it was read with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSequenceClassification,
    Gemma3Config,
    Gemma4TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    OPTConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
)

from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.engine.weights import disk_weights
from rlhf_ray.errors import IntegrityError, ModelLoadError
from rlhf_ray.models import load_regression, save
from rlhf_ray.models.actor import Actor
from rlhf_ray.models.regression import SequenceRegression
from rlhf_ray.models.regression_loading import get_llm_for_sequence_regression, make_head, wrap_backbone
from rlhf_ray.models.save import save_pretrained
from rlhf_ray.models.weights.lora import add_lora

from .conftest import ALL_FAMILIES, SIZES, VOCABULARY, random_model, save_random, shake_adapters, word_tokenizer

PLAIN = {name: size for name, size in SIZES.items() if name not in {"num_key_value_heads", "head_dim"}}
BY_ROLE = {
    "policy": {"architectures", "dtype"},
    "reward": {"architectures", "dtype", "id2label", "label2id", "problem_type", "value_head_prefix"},
}
"""The keys of config.json that docs/models.md lets differ where neither padding nor the vocabulary changed."""
WITH_SWITCHES: dict[str, Callable[[], PreTrainedConfig]] = {
    **{family: ALL_FAMILIES[family] for family in ("llama", "gemma3", "mixtral", "olmoe", "minimax-m2")},
    "gpt2": lambda: GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.2, pad_token_id=0),
    "gpt-neox": lambda: GPTNeoXConfig(**PLAIN, hidden_dropout=0.1),
    "opt": lambda: OPTConfig(
        vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, dropout=0.1, layerdrop=0.1, initializer_range=0.2,
    ),
    "phimoe": lambda: PhimoeConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
    "gemma4": lambda: Gemma4TextConfig(
        **SIZES, hidden_size_per_layer_input=0, layer_types=["sliding_attention", "full_attention"], sliding_window=5
    ),
}  # fmt: skip
"""Configs with dropout, routers and embeddings that a run switches off or on for itself."""


class Counted(nn.Module):
    """A module without parameters, whose buffers training changes, as in models that bring their code."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.linspace(-1, 1, 5))
        self.register_buffer("seen", torch.tensor(7))
        self.register_buffer("nan", torch.tensor([float("nan"), 1.0]))
        self.register_buffer("mean_again", self.mean)
        self.register_buffer("scratch", torch.ones(3), persistent=False)


def with_buffers(model: PreTrainedModel) -> PreTrainedModel:
    """Buffers on the model itself, on a layer without parameters of its own, in a new module, and beside parameters."""
    backbone = cast(Any, model.base_model)
    backbone.register_buffer("origin", torch.tensor([3.0, 4.0]))
    backbone.layers[1].register_buffer("layer_scalar", torch.tensor(0.7))
    backbone.layers[0].self_attn.q_proj.register_buffer("mask", torch.tensor([True, False]))
    backbone.add_module("statistics", Counted())
    return model


def adapted(model: PreTrainedModel, *, lora: bool) -> PreTrainedModel:
    if lora:
        add_lora(model, rank=2, alpha=4, targets=["q_proj", "down_proj"])
        shake_adapters(model)
    return model


def reward_on(model: PreTrainedModel) -> SequenceRegression:
    backbone = cast(PreTrainedModel, model.base_model)
    head = make_head(backbone, "inv_sqrt", 0)
    return wrap_backbone(backbone, head, "reward", attention="auto", strict_attention=False, head_origin="test")


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("role", ["policy", "reward"])
def test_every_persistent_buffer_is_written_and_published(tmp_path: Path, role: str, lora: bool) -> None:
    plain = with_buffers(random_model("llama"))
    buffers = {
        name: tensor
        for name, tensor in plain.state_dict().items()
        if name in dict(plain.named_buffers(remove_duplicate=False))
    }
    model: Any = Actor(plain, param_dtype="fp32") if role == "policy" else reward_on(plain)
    adapted(model.model if role == "policy" else model.backbone, lora=lora)
    save_pretrained(model, None, tmp_path)
    inner = model.model if role == "policy" else model
    published = {name: tensor for group in disk_weights(inner, receive=True) for name, tensor in group}
    written = load_file(tmp_path / "model.safetensors")
    assert written.keys() == published.keys() and len(buffers) == 7
    for tensors in (written, published):
        assert all(torch.allclose(tensors[name], buffer, equal_nan=True) for name, buffer in buffers.items())
        assert {tensors[name].dtype for name in buffers} == {torch.float32, torch.int64, torch.bool}
    assert not any("scratch" in name for name in written)


def test_state_that_no_file_could_hold_is_refused_at_once() -> None:
    class Scaled(nn.Module):
        def get_extra_state(self) -> dict[str, float]:
            return {"scale": 2.0}

        def set_extra_state(self, state: dict[str, float]) -> None:
            """Nothing to set."""

    model = random_model("llama")
    model.base_model.add_module("scaled", Scaled())
    with pytest.raises(
        ModelLoadError, match=r"LlamaForCausalLM holds model.scaled._extra_state, which is neither a parameter"
    ):
        Actor(model, param_dtype="fp32")


@pytest.mark.parametrize("family", ["gemma4", "minimax-m2"])
def test_a_policy_with_buffers_comes_back_with_its_numbers(tmp_path: Path, family: str) -> None:
    theirs = AutoModelForCausalLM.from_config(WITH_SWITCHES[family](), attn_implementation="eager").eval()
    scaled = [buffer for name, buffer in theirs.named_buffers() if "layer_scalar" in name or "correction" in name]
    for buffer in scaled:
        nn.init.uniform_(buffer, 0.5, 1.0)
    theirs.save_pretrained(tmp_path / "base")
    save_pretrained(Actor(str(tmp_path / "base"), param_dtype="fp32"), None, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager").eval()
    ids = torch.tensor([[5, 9, 12, 7, 1]])
    with torch.no_grad():
        assert scaled and torch.equal(again(ids).logits, theirs(ids).logits)


def with_vision(family: str) -> PreTrainedModel:
    """A model that reads images too, of which only the part that reads text is used."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    if family == "gemma3":
        siglip = {**vision, "num_hidden_layers": 1, "image_size": 28, "patch_size": 14, "vision_use_head": False}
        text = {**SIZES, "sliding_window": 5, "query_pre_attn_scalar": 8}
        config: PreTrainedConfig = Gemma3Config(
            text_config=text, vision_config=siglip, mm_tokens_per_image=4, pad_token_id=0, eos_token_id=2
        )
    else:
        rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
        qwen = {**vision, "depth": 1, "num_heads": 2, "out_hidden_size": 32}
        config = Qwen2_5_VLConfig(
            text_config={**SIZES, "rope_parameters": rope}, vision_config=qwen, pad_token_id=0, eos_token_id=2
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()


@pytest.mark.parametrize("family", ["gemma3", "qwen2.5-vl"])
def test_a_reward_model_on_a_part_of_a_model_keeps_the_names_on_disk(tmp_path: Path, family: str) -> None:
    """They are those of the class that reads it, also where the engine hands over one layer at a time."""
    base = with_vision(family)
    base.save_pretrained(tmp_path / "base")
    reward = get_llm_for_sequence_regression(
        str(tmp_path / "base"), "reward", param_dtype="fp32", init_value_head=True, lora_rank=2
    ).eval()
    shake_adapters(reward)
    save_pretrained(reward, None, tmp_path / "out")
    written, original = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "base"))
    assert written.keys() - {"score.weight"} == original.keys() - {"lm_head.weight"}
    published = {name: tensor for group in disk_weights(reward, receive=True) for name, tensor in group}
    assert written.keys() == published.keys() and all(written[name].equal(published[name]) for name in written)
    ids = torch.tensor([[5, 9, 12, 7, 1]])
    readers = [get_llm_for_sequence_regression(str(tmp_path / "out"), "reward", param_dtype="fp32").eval()]
    if family == "gemma3":
        readers.append(
            AutoModelForSequenceClassification.from_pretrained(tmp_path / "out", attn_implementation="eager")
        )
    with torch.no_grad():
        for again in readers:
            scores = again(ids)
            scores = scores if isinstance(scores, Tensor) else scores.logits[:, 0]
            torch.testing.assert_close(scores, reward(ids), atol=1e-5, rtol=1e-5)


NORM = "model.norm.weight"


def dropped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights.items() if "layers.1.mlp" not in name}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (dropped, r"holds is not in the files: model.layers.1.mlp.down_proj.weight, .*gate_proj.weight, .*up_proj.weight"),
        (lambda weights: weights | {NORM: weights[NORM] + 1e-7}, "is not what the model holds: model.norm.weight"),
        (lambda weights: weights | {NORM: weights[NORM].half()}, "is not what the model holds: model.norm.weight"),
        (lambda weights: weights | {NORM: torch.ones(7)}, "is not what the model holds: model.norm.weight"),
        (lambda weights: weights | {"extra": torch.ones(2)}, "hold what the model does not: extra"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", ["20KB", "5GB"])
def test_what_is_not_in_the_files_as_the_model_holds_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[..., Any], message: str, size: str
) -> None:
    write = save.save_torch_state_dict
    monkeypatch.setattr(
        save, "save_torch_state_dict", lambda weights, *rest, **named: write(damage(weights), *rest, **named)
    )
    with pytest.raises(IntegrityError, match=message):
        save_pretrained(Actor(random_model("llama"), param_dtype="fp32"), None, tmp_path, max_shard_size=size)


def test_what_was_not_gathered_is_named(tmp_path: Path) -> None:
    """The state may come from an engine: it is held against the model, not only against itself."""
    actor = Actor(with_buffers(random_model("llama")), param_dtype="fp32")
    state = {name: tensor for group in disk_weights(actor.model, receive=True) for name, tensor in group}
    del state["model.layers.1.layer_scalar"]
    with pytest.raises(IntegrityError, match=r"holds is not in the files: model.layers.1.layer_scalar\. Do not use"):
        save_pretrained(actor, None, tmp_path, state=state)


def content(directory: Path, name: str = "config.json") -> dict[str, Any]:
    return cast(dict[str, Any], json.loads((directory / name).read_text()))


def different(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    return {name for name in one.keys() | other.keys() if one.get(name, ...) != other.get(name, ...)}


@pytest.mark.parametrize("family", WITH_SWITCHES)
def test_the_config_differs_in_documented_keys_only(tmp_path: Path, family: str) -> None:
    config = WITH_SWITCHES[family]()
    for name in ("attention_dropout", "attn_pdrop", "embd_pdrop", "router_jitter_noise"):
        if hasattr(config, name):
            setattr(config, name, 0.1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    before, table = content(tmp_path / "base"), Path("docs/models.md").read_text()
    policy = Actor(str(tmp_path / "base"), param_dtype="fp32", lora_rank=0 if family == "gpt2" else 2)
    reward = get_llm_for_sequence_regression(str(tmp_path / "base"), "reward", param_dtype="fp32", init_value_head=True)
    for role, model in (("policy", policy), ("reward", reward)):
        save_pretrained(model, None, tmp_path / role)
        assert different(before, content(tmp_path / role)) <= BY_ROLE[role]
        assert all(f"`{name}`" in table for name in BY_ROLE[role])
    assert content(tmp_path / "base", "generation_config.json") == content(
        tmp_path / "policy", "generation_config.json"
    )


def test_what_transformers_would_not_write_itself_stays_in_the_config(tmp_path: Path) -> None:
    """Older names, keys of others, defaults, and a generation config that transformers refuses to save."""
    save_random("llama", tmp_path / "base")
    config = content(tmp_path / "base")
    del config["rope_parameters"], config["dtype"]
    config |= {
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "torch_dtype": "float32",
        "use_cache": True,
        "ours": {"a": 1},
    }
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    generation = {"temperature": 0.6, "top_p": 0.9, "do_sample": False, "eos_token_id": [2, 7]}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(generation))
    save_pretrained(Actor(str(tmp_path / "base"), param_dtype="bf16"), None, tmp_path / "out")
    assert content(tmp_path / "out") == config | {"torch_dtype": "bfloat16"}
    assert content(tmp_path / "out", "generation_config.json") == generation
    (tmp_path / "base" / "generation_config.json").unlink()
    save_pretrained(Actor(str(tmp_path / "base"), param_dtype="bf16"), None, tmp_path / "plain")
    assert not (tmp_path / "plain" / "generation_config.json").exists()


def test_padding_and_a_grown_embedding_are_in_the_config(tmp_path: Path) -> None:
    save_random("gemma2", tmp_path / "base")
    word_tokenizer(pad=False, size=52).save_pretrained(tmp_path / "base")
    reward = load_regression(ModelConfig(path=str(tmp_path / "base"), dtype="fp32", head_init="hf"), "reward")
    save_pretrained(reward, None, tmp_path / "reward")
    assert different(content(tmp_path / "base"), content(tmp_path / "reward")) <= BY_ROLE["reward"] | {
        "vocab_size",
        "pad_token_id",
    }
    assert content(tmp_path / "reward")["vocab_size"] == 56 and content(tmp_path / "reward")["pad_token_id"] == 52
    again = AutoConfig.from_pretrained(tmp_path / "reward")
    assert (again.vocab_size, again.pad_token_id, again.num_labels) == (56, 52, 1)
    assert (
        get_llm_for_sequence_regression(str(tmp_path / "reward"), "reward").get_input_embeddings().num_embeddings == 56
    )
