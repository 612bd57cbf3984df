"""Turn the parameters and buffers of a model in memory into tensors with the names and the form that they have on disk.

Invariant: the result is what ``from_pretrained`` and vLLM read. The experts of a mixture come one by one, although they share
a tensor in memory; adapters are merged; 4-bit weights are dequantised; tied weights come once; a head is ``score.weight``, or
``score.0.weight`` and so on for an MLP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rlhf_ray.models.regression import SequenceRegression
from rlhf_ray.models.weights.checkpoint import HEAD_NAME
from rlhf_ray.models.weights.held import held_tensors
from rlhf_ray.models.weights.lora import merged
from rlhf_ray.models.weights.quantization import dequantized


def to_disk_names(
    model: PreTrainedModel | SequenceRegression, tensors: Iterable[tuple[str, Tensor]] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name on disk, tensor) for parameters and persistent buffers of ``model``, by default for all of them.

    ``tensors`` may be any group of (name in memory, whole tensor) that holds whole layers, such as the groups of
    ``Engine.full_state``.
    """
    named = {name: dequantized(tensor) for name, tensor in held_tensors(model)} if tensors is None else dict(tensors)
    if isinstance(model, SequenceRegression):
        yield from _regression_names(model, named)
    else:
        yield from revert_weight_conversion(model, merged(model, named)).items()


def _regression_names(model: SequenceRegression, named: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    start, head = f"{model.backbone.base_model_prefix}.", f"{model.value_head_prefix}."
    inside = {name.removeprefix(start): tensor for name, tensor in named.items() if not name.startswith(head)}
    for name, tensor in revert_weight_conversion(model.backbone, merged(model.backbone, inside)).items():
        yield start + name, tensor
    for name, tensor in named.items():
        if name.startswith(head):
            yield f"{HEAD_NAME}.{name.removeprefix(head)}", tensor
