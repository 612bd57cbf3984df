"""Read what an adapter trained whole beside LoRA: modules to save, an embedding that grew, single tokens.

Invariant: each such tensor of the adapter's file is in the model afterwards, with the meaning that PEFT gives it, or the
option of the adapter's config that brought it is named in an error. A head is left to ``models.heads``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ray.config.files.adapters import MERGE
from rlhf_ray.console import get_logger
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.forward.shards import in_shards
from rlhf_ray.models.weights.adapters import (
    belongs_to,
    is_tied,
    lora_config,
    read_adapter,
    remember_replaced,
    tied_names,
)
from rlhf_ray.models.weights.lora import whole_names
from rlhf_ray.models.weights.quantization import dequantized_like
from rlhf_ray.models.weights.sharded import is_sent, made_whole

TOKENS = ".token_adapter.trainable_tokens_delta"
"""How PEFT's name of the rows of single tokens ends, which replace rows of the embedding."""


def replace_modules(model: PreTrainedModel, directory: Path) -> None:
    """Put what the adapter in ``directory`` trained whole into ``model``, which is a base as it was loaded."""
    config, file = lora_config(directory), read_adapter(directory)
    kept = {name: tensor for name, tensor in file.items() if ".lora_" not in name and belongs_to(model, name, None)}
    if not kept:
        return
    rows = {name.removesuffix(TOKENS): tensor for name, tensor in kept.items() if name.endswith(TOKENS)}
    whole = {name.replace(".base_layer.", "."): kept[name] for name in kept if not name.endswith(TOKENS)}
    _check_ties(model, {name: kept[name] for name in whole if name in kept}, directory, config)
    _resize(model, whole, directory)
    view = whole_names(model)
    live = dict(view.named_parameters(remove_duplicate=False)) | dict(view.named_buffers(remove_duplicate=False))
    for name, tensor in whole.items():
        _check(name, tensor, live, directory)
        with made_whole([live[name]]), torch.no_grad():
            if not is_sent(live[name]):
                live[name].copy_(tensor)
    for name, tensor in rows.items():
        _replace_rows(live.get(f"{name}.weight"), name, tensor, directory, config)
    replaced = sorted({*whole, *(f"{name}.weight" for name in rows)})
    both = tied_names(model) or ()
    remember_replaced(model, (*replaced, *(both if set(both) & set(replaced) else ())))
    get_logger(__name__).info(
        "the adapter %s brings %s besides LoRA: they are read, and stay as they are in training",
        directory,
        ", ".join(replaced),
    )


def _check(name: str, tensor: Tensor, live: dict[str, Any], directory: Path) -> None:
    if name not in live:
        option = "bias" if name.endswith(".bias") else "modules_to_save"
        raise ModelLoadError(
            f"{name} of the adapter {directory} ({option}) is not in its base: give the base that it was trained on, or {MERGE}"
        )
    if dequantized_like(live[name]) is not None:
        raise ModelLoadError(
            f"{name} of the adapter {directory} (modules_to_save) is in 4 bits in its base: leave quantization out, or {MERGE}"
        )
    shape = getattr(live[name], "ds_shape", live[name].shape)
    if tensor.shape != shape:
        raise ModelLoadError(
            f"{name} of the adapter {directory} (modules_to_save) has shape {tuple(tensor.shape)}, but its model needs "
            f"{tuple(shape)}: it belongs to a model of another size"
        )


def _check_ties(model: PreTrainedModel, whole: dict[str, Tensor], directory: Path, config: Any) -> None:
    """Refuse an embedding and an output layer that differ, of a model that has one weight for both."""
    both = tied_names(model)
    if both is None:
        return
    given = [whole[name] for name in both if name in whole]
    if not given or (len(given) == 1 and config.ensure_weight_tying) or (len(given) == 2 and torch.equal(*given)):
        return
    raise ModelLoadError(
        f"modules_to_save of the adapter {directory} trained {' and '.join(name for name in both if name in whole)} apart, but "
        f"{type(model).__name__} has one weight for {both[0]} and {both[1]} (tie_word_embeddings), and the adapter does not "
        f"set ensure_weight_tying: {MERGE}, with tie_word_embeddings false in its config"
    )


def _names_of(model: PreTrainedModel, layer: nn.Module) -> str:
    return next(f"{name}.weight" for name, module in whole_names(model).named_modules() if module is layer)


def _resize(model: PreTrainedModel, whole: dict[str, Tensor], directory: Path) -> None:
    """Give the model as many rows as the embedding that the adapter brings, which grew or shrank with its tokenizer."""
    embedding: Any = model.get_input_embeddings()
    brought = whole.get(_names_of(model, embedding))
    if brought is None or brought.shape[0] == embedding.num_embeddings:
        return
    rows, own_rows = brought.shape[0], embedding.num_embeddings
    changes = f"the adapter {directory} brings an embedding of {rows} rows for the {own_rows} of its base"
    if in_shards(model):
        raise ModelLoadError(f"{changes}, which lies in shards (ZeRO-3): use ZeRO stage 2 or less, or {MERGE}")
    output = model.get_output_embeddings()
    if output is not None and not is_tied(model) and _names_of(model, output) not in whole:
        raise ModelLoadError(f"{changes}, but no output layer of as many (modules_to_save): {MERGE}")
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(rows, mean_resizing=False)


def _replace_rows(weight: Tensor | None, name: str, rows: Tensor, directory: Path, config: Any) -> None:
    indices = config.trainable_token_indices
    if isinstance(indices, dict):
        indices = next((ids for path, ids in indices.items() if f".{name}".endswith(f".{path}")), None)
    if (
        weight is None
        or not indices
        or len(indices) != len(rows)
        or max(indices) >= getattr(weight, "ds_shape", weight.shape)[0]
    ):
        raise ModelLoadError(
            f"trainable_token_indices of the adapter {directory} does not fit {name}: it names {indices}, and the file has "
            f"{len(rows)} rows. Give the base that it was trained on, or {MERGE}"
        )
    with made_whole([weight]), torch.no_grad():
        if not is_sent(weight):
            weight[torch.tensor(indices)] = rows.to(weight)
