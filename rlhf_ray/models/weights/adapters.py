"""Read directories that hold a LoRA adapter for another model, in the layout of PEFT.

Invariants: every tensor of the adapter's file is used, or the directory is refused. What an adapter uses beyond plain LoRA
is refused by name, since it would not be merged correctly. A pickle is never opened.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.weights.checkpoint import HEAD_NAME
from rlhf_ray.models.weights.lora import ADAPTER, inject, peft

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT writes before the name of every tensor."""
HEADS = (HEAD_NAME, "value_head")
"""What the head of a reward model or critic is called beside an adapter."""


def load_adapter(model: PreTrainedModel, directory: Path, *, inside: str = "") -> None:
    """Put the adapter in ``directory`` on ``model``. A head beside it is left to ``models.heads``.

    ``inside`` is the path of ``model`` within the model that the adapter was made for: ``model.`` for a backbone.
    """
    inject(model, _plain_lora(directory))
    parameters = {inside + name: parameter for name, parameter in model.named_parameters() if "lora_" in name}
    tensors = {_live_name(name): tensor for name, tensor in read_adapter(directory).items() if not _in_head(name)}
    different = sorted(parameters.keys() ^ tensors.keys())
    if different:
        raise ModelLoadError(
            f"the adapter {directory} does not belong to a {type(model).__name__}: only one of them has {different[0]}"
            + (f" (and {len(different) - 1} others differ)" if len(different) > 1 else "")
            + ". Give the base that the adapter was trained on"
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ModelLoadError(
                f"{name} of the adapter {directory} has shape {tuple(tensors[name].shape)}, but its model needs "
                f"{tuple(parameter.shape)}: it belongs to a model of another size"
            )
        parameter.data.copy_(tensors[name])


def refuse_second_adapter(name: str, adapter: Path | None, rank: int) -> None:
    """Refuse to put a fresh adapter of this rank (0: none) on a model that has loaded one."""
    if adapter is not None and rank:
        raise ModelLoadError(
            f"{name} is a LoRA adapter already: leave lora_rank out (in a config, lora) to go on training it, or merge it "
            "first with rlhf-ray export"
        )


def read_adapter(directory: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter, without the prefix of PEFT."""
    pickle = directory / "adapter_model.bin"
    if not (directory / WEIGHTS).is_file():
        if pickle.is_file():
            raise ModelLoadError(
                f"{directory} holds its adapter as pickle ({pickle.name}), which can run code when opened and is never "
                "read: convert it to safetensors"
            )
        raise ModelLoadError(f"{directory} has no {WEIGHTS}: copy the whole adapter")
    try:
        return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(directory / WEIGHTS).items()}
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{directory / WEIGHTS} cannot be read: {error}") from error


def _plain_lora(directory: Path) -> Any:
    adapter = peft().PeftConfig.from_pretrained(str(directory))
    if not isinstance(adapter, peft().LoraConfig):
        raise ModelLoadError(
            f"the adapter {directory} is of type {adapter.peft_type}: only LoRA adapters are supported"
        )
    used = {
        "use_dora": adapter.use_dora,
        "bias": adapter.bias != "none",
        "lora_bias": adapter.lora_bias,
        "target_parameters": bool(adapter.target_parameters),
    }
    if any(used.values()):
        names = ", ".join(name for name, is_used in used.items() if is_used)
        raise ModelLoadError(
            f"the adapter {directory} uses {names}, which is not supported: merge it into its base with PEFT, and give that"
        )
    adapter.modules_to_save, adapter.inference_mode = None, False
    return adapter


def _in_head(name: str) -> bool:
    """Whether a tensor is part of a head that was trained whole; an adapter on a head is not."""
    return name.startswith(tuple(f"{head}." for head in HEADS)) and ".lora_" not in name


def _live_name(name: str) -> str:
    """Return the name of a parameter in memory, which has the adapter's name before its last part."""
    path, _, last = name.rpartition(".")
    return f"{path}.{ADAPTER}.{last}"


def adapter_name(live: str) -> str:
    """Return the name in PEFT's file of an adapter's parameter that is called ``live`` in memory."""
    return PREFIX + live.replace(f".{ADAPTER}.", ".")
