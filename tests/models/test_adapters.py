"""Adapter directories are PEFT's, both ways; head and adapter train, and are written, together."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.models.description import describe
from rlhf_ray.models.regression import PackedRegression, SequenceRegression
from rlhf_ray.models.regression_loading import get_llm_for_sequence_regression
from rlhf_ray.models.save import save_adapter, save_pretrained
from rlhf_ray.models.weights.lora import adapted_layers
from rlhf_ray.trajectories.packing import Packed

from .conftest import random_model, save_random, shake_adapters, word_tokenizer

FAMILIES = ["llama", "gemma2", "mixtral", "olmoe"]


def load(directory: Path, **options: object) -> SequenceRegression:
    return get_llm_for_sequence_regression(str(directory), "reward", **{"param_dtype": "fp32", **options}).eval()


def adapted(base: Path, family: str = "llama", **options: object) -> SequenceRegression:
    """A reward model with an adapter that changes something, over a base that has no head."""
    save_random(family, base)
    model = load(base, init_value_head=True, lora_rank=3, lora_alpha=5, seed=4, **options)
    shake_adapters(model)
    return model


def scores(model: SequenceRegression, packed: Packed) -> torch.Tensor:
    return PackedRegression(model)(packed, "scores").detach()


def classifier(base: Path) -> PreTrainedModel:
    return AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, attn_implementation="eager")


def peft_scores(model: nn.Module, packed: Packed) -> torch.Tensor:
    sequences = packed.token_ids.split(packed.lengths.tolist())
    with torch.no_grad():
        return torch.cat([model.eval()(input_ids=sequence[None]).logits[:, 0] for sequence in sequences])


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_loads_back_on_its_base(tmp_path: Path, family: str, packed: Packed) -> None:
    model = adapted(tmp_path / "base", family)
    save_adapter(model, word_tokenizer(), tmp_path / "adapter")
    again = load(tmp_path / "adapter")
    assert torch.equal(scores(again, packed), scores(model, packed))
    assert "head score fp32 (loaded with the adapter)" in describe(again)
    trained = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert "score.weight" in trained and len(trained) == 1 + 2 * len(adapted_layers(again))
    assert not any(
        name.endswith("embed_tokens.weight") for name in load_file(tmp_path / "adapter/adapter_model.safetensors")
    )


@pytest.mark.parametrize("family", ["llama", "gemma2", "mixtral"])
def test_peft_reads_what_is_written(tmp_path: Path, family: str, packed: Packed) -> None:
    model = adapted(tmp_path / "base", family)
    save_adapter(model, None, tmp_path / "adapter")
    base = classifier(tmp_path / "base")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    torch.testing.assert_close(peft_scores(theirs, packed), scores(model, packed), atol=1e-5, rtol=1e-5)


def test_what_peft_writes_is_read(tmp_path: Path, packed: Packed) -> None:
    save_random("llama", tmp_path / "base")
    base = classifier(tmp_path / "base")
    theirs = get_peft_model(base, LoraConfig("SEQ_CLS", r=2, target_modules=["q_proj", "up_proj"], use_rslora=True))
    shake_adapters(theirs)
    theirs.save_pretrained(tmp_path / "adapter")
    loaded = load(tmp_path / "adapter")
    torch.testing.assert_close(scores(loaded, packed), peft_scores(theirs, packed), atol=1e-5, rtol=1e-5)
    save_pretrained(loaded, None, tmp_path / "merged")
    torch.testing.assert_close(scores(load(tmp_path / "merged"), packed), scores(loaded, packed), atol=1e-5, rtol=1e-5)


def test_a_policys_adapter_loads_back_and_takes_a_fresh_head(tmp_path: Path, packed: Packed) -> None:
    save_random("qwen3", tmp_path / "base")
    actor = Actor(str(tmp_path / "base"), param_dtype="fp32", lora_rank=2, target_modules=["v_proj"])
    shake_adapters(actor)
    save_adapter(actor, None, tmp_path / "adapter")
    expected = PackedPolicy(actor)(packed).log_probs
    assert torch.equal(PackedPolicy(Actor(str(tmp_path / "adapter"), param_dtype="fp32"))(packed).log_probs, expected)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", attn_implementation="eager")
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    ids = packed.token_ids[:7]
    log_p = theirs(input_ids=ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
    torch.testing.assert_close(expected[1:7], log_p, atol=1e-5, rtol=1e-5)
    with pytest.raises(ModelLoadError, match=r"adapter has no score head"):
        load(tmp_path / "adapter")
    assert "fresh, inv_sqrt" in describe(load(tmp_path / "adapter", init_value_head=True))


def test_quantised_bases_take_adapters_from_disk(tmp_path: Path, packed: Packed) -> None:
    model = adapted(tmp_path / "base", load_in_4bit=True)
    save_adapter(model, None, tmp_path / "adapter")
    assert torch.equal(scores(load(tmp_path / "adapter", load_in_4bit=True), packed), scores(model, packed))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_reaches_the_adapters(tmp_path: Path, packed: Packed, reentrant: bool) -> None:
    gradients = []
    for enabled in (False, True):
        model = adapted(tmp_path / "base").train()
        if enabled:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        PackedRegression(model)(packed, "scores").sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    for a, b in zip(*gradients, strict=True):  # checkpointed, the last layer computes what no score reads as well
        largest = float(a.abs().max())
        assert largest > 0
        torch.testing.assert_close(a, b, atol=1e-6 * largest, rtol=1e-6)


def test_only_the_adapters_own_dropout_is_on(tmp_path: Path, packed: Packed) -> None:
    for dropout in (0.0, 0.5):
        model = adapted(tmp_path / f"{dropout}", lora_dropout=dropout).train()
        assert {module.p for module in model.modules() if isinstance(module, nn.Dropout)} <= {0.0, dropout}
        assert torch.equal(scores(model, packed), scores(model, packed)) == (dropout == 0.0)
        assert torch.equal(scores(model.eval(), packed), scores(model.eval(), packed))


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("family", "targets", "message"),
    [
        ("llama", ["q_proj", "w1"], r"'w1' does not fit LlamaForCausalLM: choose all-linear or some of down_proj"),
        ("llama", "nothing.*", r"'nothing\.\*' do not fit"),
        ("mixtral", "(.*_proj|.*experts.*)", r"do not fit MixtralForCausalLM"),
        ("mixtral", ["w1"], r"some of k_proj, o_proj, q_proj, v_proj \(the experts of a mixture are 3-D parameters"),
    ],
)
def test_targets_that_match_nothing(family: str, targets: str | list[str], message: str) -> None:
    with pytest.raises(ModelLoadError, match=message):
        Actor(random_model(family), param_dtype="fp32", lora_rank=2, target_modules=targets)


def test_on_mixtures_only_attention_is_adapted_and_that_is_reported() -> None:
    for family in ("mixtral", "olmoe", "qwen3-moe"):
        actor = Actor(random_model(family), param_dtype="fp32", lora_rank=2)
        assert all(".self_attn." in name for name in adapted_layers(actor.model))
        assert "LoRA rank 2 on 8 layers (not on the experts, which are 3-D parameters)" in describe(actor)


def change(directory: Path, **config: object) -> None:
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_adapter(adapted(tmp_path / "base"), None, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"base_model_name_or_path": None}, "does not say which model it belongs to"),
        ({"base_model_name_or_path": "/nowhere"}, "LoRA adapter of /nowhere: .*does not exist"),
        ({"peft_type": "IA3", "feedforward_modules": []}, "is of type IA3, and only LoRA"),
        ({"use_dora": True}, r"uses use_dora \(True\), which is not supported"),
        ({"r": 7}, r"lora_A.*shape \(3, .*belongs to a model of another size"),
        (
            {"target_modules": ["q_proj"]},
            r"its file has LoRA on model\.layers\.0\.mlp\.down_proj .*but target_modules has not",
        ),
    ],
)
def test_adapters_that_cannot_be_used(adapter: Path, config: dict[str, object], message: str) -> None:
    change(adapter, **config)
    with pytest.raises(ModelLoadError, match=message):
        load(adapter)


def test_files_of_adapters_that_cannot_be_read(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    whole = load_file(weights)
    save_file({name: tensor for name, tensor in whole.items() if "layers.1.mlp.up_proj" not in name}, weights)
    with pytest.raises(
        ModelLoadError, match=r"target_modules has .* model\.layers\.1\.mlp\.up_proj .*but its file has not"
    ):
        load(adapter)
    save_file(whole | {"base_model.model.model.embed_positions.weight": torch.ones(48, 32)}, weights)
    with pytest.raises(ModelLoadError, match=r"embed_positions.weight of .* \(modules_to_save\) is not in its base"):
        load(adapter)
    weights.write_bytes(b"broken")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        load(adapter)
    weights.rename(adapter / "adapter_model.bin")
    with pytest.raises(ModelLoadError, match=r"as pickle \(adapter_model.bin\)"):
        load(adapter)
    (adapter / "adapter_model.bin").unlink()
    with pytest.raises(ModelLoadError, match=r"has no adapter_model.safetensors"):
        load(adapter)


def test_an_adapter_over_an_adapter_and_one_without_a_base_on_disk(adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="is a LoRA adapter already: leave lora_rank out"):
        load(adapter, lora_rank=2)
    with pytest.raises(ModelLoadError, match="no directory"):
        save_adapter(Actor(random_model("llama"), param_dtype="fp32", lora_rank=2), None, tmp_path / "out")
    with pytest.raises(ModelLoadError, match="no LoRA adapter to save"):
        save_adapter(Actor(random_model("llama"), param_dtype="fp32"), None, tmp_path / "out")
