"""Turn the parameters and buffers of a model in memory into tensors with the names and the form that they have on disk.

Invariant: the result is what ``from_pretrained`` and vLLM read. The experts of a mixture come one by one, although they share
a tensor in memory; adapters are merged, or left out where they travel alone; 4-bit weights are dequantised; tied weights come
once; a head is ``score.weight``, or ``score.0.weight`` and so on for an MLP.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedModel,
)
from transformers.core_model_loading import revert_weight_conversion

from rlhf_ray.models.regression import SequenceRegression
from rlhf_ray.models.weights.checkpoint import HEAD_NAME
from rlhf_ray.models.weights.held import held_tensors
from rlhf_ray.models.weights.lora import merged, without_adapters
from rlhf_ray.models.weights.quantization import dequantized

READER = "model_that_reads"
Adapters = Literal["merged", "left out"]


def to_disk_names(
    model: PreTrainedModel | SequenceRegression,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    *,
    adapters: Adapters = "merged",
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name on disk, tensor) for parameters and persistent buffers of ``model``, by default for all of them.

    ``tensors`` may be any group of (name in memory, whole tensor) that holds whole layers, such as the groups of
    ``Engine.full_state``. Adapters of a model without a head can be ``left out``, so that it is the base that comes.
    """
    named = {name: dequantized(tensor) for name, tensor in held_tensors(model)} if tensors is None else dict(tensors)
    if isinstance(model, SequenceRegression):
        yield from _regression_names(model, named)
    else:
        whole = merged(model, named) if adapters == "merged" else without_adapters(named)
        yield from revert_weight_conversion(model, whole).items()


def _regression_names(model: SequenceRegression, named: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    start, head = f"{model.backbone.base_model_prefix}.", f"{model.value_head_prefix}."
    inside = {name.removeprefix(start): tensor for name, tensor in named.items() if not name.startswith(head)}
    whole, reader = merged(model.backbone, inside), _reader(model)
    if reader is None:
        for name, tensor in revert_weight_conversion(model.backbone, whole).items():
            yield start + name, tensor
    else:
        yield from revert_weight_conversion(reader, {start + name: whole[name] for name in whole}).items()
    for name, tensor in named.items():
        if name.startswith(head):
            yield f"{HEAD_NAME}.{name.removeprefix(head)}", tensor


def _reader(model: SequenceRegression) -> PreTrainedModel | None:
    """Return the model, without data, that reads the weights if other parts than text have names of their own on disk.

    In such a model the names depend on the class around the backbone: its classifier, or else the one that generates.
    """
    if model.config.get_text_config() is model.config:
        return None
    if not hasattr(model, READER):
        kind = type(model.config)
        mappings = (MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING)
        known: Any = next((mapping[kind] for mapping in mappings if kind in mapping), None)
        with torch.device("meta"):
            reader = None if known is None else known(deepcopy(model.config))
        setattr(model, READER, (reader,))  # in a tuple, or it would become a part of the model
    found: PreTrainedModel | None = getattr(model, READER)[0]
    return found
