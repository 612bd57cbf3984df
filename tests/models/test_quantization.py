"""What is in 4 bits is frozen and computes with its dequantised weight; what leaves the model is dequantised."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.models.description import describe
from rlhf_ray.models.disk_names import to_disk_names
from rlhf_ray.models.regression import PackedRegression, SequenceRegression
from rlhf_ray.models.regression_loading import get_llm_for_sequence_regression
from rlhf_ray.models.save import save_pretrained
from rlhf_ray.models.weights import quantization
from rlhf_ray.models.weights.quantization import dequantized, four_bit_layers
from rlhf_ray.trajectories.packing import Packed

from .conftest import random_model, save_random, shake_adapters

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_key_value_heads": 4}
"""Wide enough for the packed format that bitsandbytes would evaluate in."""


def policy(directory: Path, family: str = "llama", **options: object) -> Actor:
    save_random(family, directory)
    return Actor(str(directory), param_dtype="fp32", load_in_4bit=True, **options)


def critic(directory: Path, **options: object) -> SequenceRegression:
    random_model("llama", **WIDE).save_pretrained(directory)
    return get_llm_for_sequence_regression(
        str(directory), "critic", param_dtype="fp32", load_in_4bit=True, init_value_head=True, **options
    )


def test_numbers_are_those_of_the_dequantised_weights(tmp_path: Path, family: str, packed: Packed) -> None:
    """Written out they make a plain model, of the names that the checkpoint had, which gives the same log-probs."""
    actor = policy(tmp_path / "base", family)
    save_pretrained(actor, None, tmp_path / "plain")
    original, written = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "plain"))
    assert {name: tensor.shape for name, tensor in original.items()} == {n: t.shape for n, t in written.items()}
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    log_probs = PackedPolicy(actor)(packed).log_probs
    plain = PackedPolicy(Actor(str(tmp_path / "plain"), param_dtype="fp32"))(packed).log_probs
    torch.testing.assert_close(log_probs, plain, atol=1e-5, rtol=1e-5)
    whole = PackedPolicy(Actor(str(tmp_path / "base"), param_dtype="fp32"))(packed).log_probs
    assert float((whole - plain).detach().abs().max()) > 1e-2


@pytest.mark.parametrize(("name", "layers"), [("llama", 14), ("mixtral", 8), ("olmoe", 8)])
def test_only_linear_layers_are_in_four_bits(tmp_path: Path, name: str, layers: int) -> None:
    """Not the embedding, norms, output layer and head; of a mixture attention only, and the report says so."""
    actor = policy(tmp_path, name)
    quantized = four_bit_layers(actor.model)
    assert len(quantized) == layers and all(".self_attn." in path or name == "llama" for path in quantized)
    assert not any(parameter.requires_grad for parameter in actor.parameters())
    line = describe(actor)
    assert f"NF4 on {layers} layers" in line and ("(not on the experts" in line) == (name != "llama")
    count = sum(dequantized(parameter).numel() for parameter in actor.parameters())
    assert f"{count / 1000:.3g}k parameters (0 trainable)" in line


def gradients(model: SequenceRegression, packed: Packed) -> list[Tensor]:
    model.zero_grad()
    PackedRegression(model.train())(packed, "values").square().sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]


def test_evaluating_changes_neither_numbers_nor_gradients(tmp_path: Path, packed: Packed) -> None:
    """bitsandbytes packs weights anew when it evaluates on some CPUs, and no gradient passes through from then on."""
    model = critic(tmp_path, lora_rank=2)
    shake_adapters(model)
    before = gradients(model, packed)
    with torch.no_grad():
        evaluated = PackedRegression(model.eval())(packed, "values")
    trained = PackedRegression(model.train())(packed, "values").detach()
    torch.testing.assert_close(evaluated, trained, atol=1e-5, rtol=1e-5)
    for first, second in zip(before, gradients(model, packed), strict=True):
        assert torch.equal(first, second) and float(first.abs().max()) > 0


def test_adapters_are_merged_into_dequantised_weights(tmp_path: Path, packed: Packed) -> None:
    """What rollout engines get: ``W + scaling * B A`` with the W that the trainer computes with."""
    model = critic(tmp_path / "base", lora_rank=2, lora_alpha=6)
    shake_adapters(model)
    layer = model.backbone.layers[1].self_attn.v_proj
    expected = (
        dequantized(layer.base_layer.weight) + 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    written = dict(to_disk_names(model))["model.layers.1.self_attn.v_proj.weight"]
    torch.testing.assert_close(written, expected, atol=1e-6, rtol=1e-6)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert "score.weight" in trained and all("lora_" in name for name in trained - {"score.weight"})
    save_pretrained(model, None, tmp_path / "merged")
    merged = get_llm_for_sequence_regression(str(tmp_path / "merged"), "critic", param_dtype="fp32")
    values = [PackedRegression(each)(packed, "values") for each in (model, merged)]
    torch.testing.assert_close(*values, atol=1e-5, rtol=1e-5)


def test_half_precision_computes_in_it(tmp_path: Path, packed: Packed) -> None:
    save_random("llama", tmp_path)
    actor = Actor(str(tmp_path), param_dtype="bf16", load_in_4bit=True, lora_rank=2)
    assert all(layer.compute_dtype == torch.bfloat16 for layer in four_bit_layers(actor.model).values())
    assert dict(to_disk_names(actor.model))["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16
    save_pretrained(actor, None, tmp_path / "plain")
    exact = Actor(str(tmp_path / "plain"), param_dtype="fp32")
    actual, expected = (PackedPolicy(each)(packed).log_probs.detach() for each in (actor, exact))
    assert float((actual - expected).norm() / expected.norm()) < 1e-2


def test_without_the_package_it_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda name: None)
    with pytest.raises(ModelLoadError, match=r"bitsandbytes, which is not installed: pip install bitsandbytes"):
        policy(tmp_path)


def test_a_model_in_memory_and_weights_that_are_quantised_already_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="in memory already"):
        Actor(random_model("llama"), load_in_4bit=True)
    path = save_random("llama", tmp_path) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelLoadError, match=r"quantised already \(gptq\)"):
        Actor(str(tmp_path))


def test_no_kernel_is_fetched_from_a_hub() -> None:
    """bitsandbytes asks the package ``kernels`` for some while it is imported."""
    program = """
import sys, types
kernels = sys.modules["kernels"] = types.ModuleType("kernels")
kernels.get_kernel = lambda *names, **options: print("fetched", names)
from rlhf_ray.models.weights.quantization import bitsandbytes
assert bitsandbytes() is sys.modules["bitsandbytes"] and sys.modules["kernels"] is kernels
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert "fetched" not in ended.stdout and "kernels" not in ended.stderr


def test_other_layers_are_left_alone() -> None:
    layer = nn.Linear(4, 4)
    assert dequantized(layer.weight) is layer.weight and four_bit_layers(nn.Sequential(layer)) == {}
