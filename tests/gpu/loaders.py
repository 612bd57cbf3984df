"""Whether models load onto the device as they load onto the CPU: policies, reward models and critics, made and read from
disk, whole, with LoRA and in 4 bits.

Always true: every parameter and buffer lies on the device, base weights have the same bits as on the CPU, and outputs agree
as far as the precision lets them.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sequences import ragged_sequences
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.environment import Device
from rlhf_ray.models import PackedPolicy, PackedRegression, save_pretrained
from rlhf_ray.models.from_config import load_policy, load_regression
from rlhf_ray.models.weights.tokenizer import load_tokenizer
from rlhf_ray.trajectories import TrajectoryBatch, pack
from tests.gpu.sizes import Sizes

LORA = {"rank": 4, "targets": "all-linear"}
LIMITS = {"fp32": 1e-3, "bf16": 5e-2, "nf4": 1e-1}
"""How far outputs may be off, as a share of their size."""
KINDS = ("policy", "reward", "critic")


def models_load(device: Device, sizes: Sizes) -> str:
    """Every kind of model: made in bf16, read in fp32, and read in bf16 with adapters."""
    torch.backends.cuda.matmul.allow_tf32 = False
    with TemporaryDirectory() as folder:
        path = write_policy(Path(folder), sizes)
        sources = [
            {"make": _made(sizes), "dtype": "bf16"},
            {"path": path, "dtype": "fp32"},
            {"path": path, "dtype": "bf16", "lora": LORA},
        ]
        configs = [ModelConfig.model_validate(source) for source in sources]
        return _worst(
            [(f"{kind} {config.dtype}", _off(kind, config, device, sizes)) for kind in KINDS for config in configs]
        )


def four_bit_models_load(device: Device, sizes: Sizes) -> str:
    """Every kind of model with NF4 weights, with adapters."""
    with TemporaryDirectory() as folder:
        source = {"path": write_policy(Path(folder), sizes), "lora": LORA, "quantization": "nf4", "dtype": "bf16"}
        config = ModelConfig.model_validate(source)
        return _worst([(f"{kind} nf4", _off(kind, config, device, sizes)) for kind in KINDS])


def _made(sizes: Sizes) -> dict[str, Any]:
    return {"shape": sizes.made, "tokenizer_from": "world", "vocabulary": 512}


def write_policy(folder: Path, sizes: Sizes) -> str:
    """A policy on disk, with its tokenizer."""
    config = ModelConfig.model_validate({"make": _made(sizes), "dtype": "fp32"})
    save_pretrained(load_policy(config), load_tokenizer(config), str(folder))
    return str(folder)


def load(kind: str, config: ModelConfig, device: torch.device) -> nn.Module:
    """A model that runs on packs. A model that has no head gets a fresh one."""
    if kind == "policy":
        return PackedPolicy(load_policy(config, device=device)).eval()
    fresh = config.model_copy(update={"head_init": "inv_sqrt"})
    return PackedRegression(load_regression(fresh, kind, device=device)).eval()


def _off(kind: str, config: ModelConfig, device: Device, sizes: Sizes) -> float:
    """How far outputs on the device are off those on the CPU."""
    reference = load(kind, config, torch.device("cpu"))
    ours = load(kind, config, torch.device(device))
    elsewhere = {name: str(tensor.device) for name, tensor in _held(ours).items() if tensor.device.type != device}
    if elsewhere:
        raise AssertionError(f"{kind}: {len(elsewhere)} tensors are not on {device}, such as {list(elsewhere)[:3]}")
    _make_alike(ours, reference, compare=config.quantization is None)
    batch = TrajectoryBatch.from_sequences(ragged_sequences(sizes.sequences, 64, longest=sizes.longest))
    with torch.no_grad():
        expected = _outputs(reference, pack(batch))
        found = _outputs(ours, pack(batch).to(device)).cpu()
    return float((found - expected).norm() / expected.norm())


def _make_alike(ours: nn.Module, reference: nn.Module, *, compare: bool) -> None:
    """Compare the weights, and give both the same adapters, which are drawn by the device's own generator."""
    there, buffers = _held(reference), dict(ours.named_buffers())
    for name, tensor in _held(ours).items():
        if "lora_" in name:
            drawn = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(len(name))) / 10
            tensor.data.copy_(drawn)
            there[name].data.copy_(drawn)
            continue
        found, expected = tensor.cpu(), there[name]
        # Buffers are computed where they lie, such as the frequencies of rotary positions.
        alike = torch.allclose(found, expected) if name in buffers else found.equal(expected)
        if compare and not alike:
            raise AssertionError(f"{name} has other values on {tensor.device.type} than on the CPU")


def _outputs(model: Any, packed: Any) -> Tensor:
    if isinstance(model, PackedPolicy):
        return model(packed).log_probs.float()
    result: Tensor = model(packed, "scores").float()
    return result


def _held(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _worst(found: list[tuple[str, float]]) -> str:
    wrong = [f"{name} {off:.1e}" for name, off in found if not off <= LIMITS[name.split()[-1]]]
    if wrong:
        raise AssertionError(f"outputs on the device and on the CPU differ by more than {LIMITS}: {', '.join(wrong)}")
    worst = {
        dtype: max(off for name, off in found if name.endswith(dtype)) for dtype in {n.split()[-1] for n, _ in found}
    }
    return f"{len(found)} models; off by at most " + ", ".join(f"{off:.1e} in {name}" for name, off in worst.items())
