"""The names that weights have on disk.

Always true: what comes out is what ``from_pretrained`` and vLLM read: experts of a mixture one by one although they
live in one tensor, adapters merged, 4-bit weights dequantised, tied weights once, a head as ``score.weight``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rlhf_ray.models.regression import SequenceRegression
from rlhf_ray.models.weights.checkpoint import HEAD_NAME
from rlhf_ray.models.weights.lora import merged
from rlhf_ray.models.weights.quantization import dequantized


def disk_names(
    model: PreTrainedModel | SequenceRegression, tensors: Iterable[tuple[str, Tensor]] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name on disk, tensor) for live parameters of ``model``, all of them by default.

    ``tensors`` may be any group of (live name, whole tensor) that holds whole layers, such as the groups of
    ``Engine.full_state``. Persistent buffers come with the parameters of their module.
    """
    if tensors is None:
        tensors = ((name, dequantized(parameter)) for name, parameter in model.named_parameters())
    given = dict(tensors)
    given |= _buffers(model, given)
    if isinstance(model, SequenceRegression):
        yield from _regression_names(model, given)
    else:
        yield from revert_weight_conversion(model, merged(model, given)).items()


def _regression_names(model: SequenceRegression, given: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    start, head = f"{model.backbone.base_model_prefix}.", f"{model.value_head_prefix}.weight"
    inside = {name.removeprefix(start): tensor for name, tensor in given.items() if name != head}
    for name, tensor in revert_weight_conversion(model.backbone, merged(model.backbone, inside)).items():
        yield start + name, tensor
    if head in given:
        yield f"{HEAD_NAME}.weight", given[head]


def _buffers(model: nn.Module, given: Iterable[str]) -> dict[str, Tensor]:
    """Find the persistent buffers of the modules that own the given parameters."""
    found: dict[str, Tensor] = {}
    for path in dict.fromkeys(name.rpartition(".")[0] for name in given):
        owner = model.get_submodule(path)
        buffers = dict(owner.named_buffers(recurse=False))
        if buffers:
            kept = owner.state_dict().keys()
            found |= {f"{path}.{name}": buffer for name, buffer in buffers.items() if name in kept}
    return found
