"""The input embedding of a model: one row for each token of its tokenizer.

Invariants: an embedding grows, to a multiple of 8 rows, if the tokenizer has more tokens than it has rows; it never
shrinks. The same seed draws the same new rows, on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.forward.shards import in_shards
from rlhf_ray.models.weights.sharded import grow_rows

ROWS_TO_MULTIPLE_OF = 8
NOISE = 0.01
"""Standard deviation of new rows around the mean row, in standard deviations of the old rows."""


def input_embedding(model: PreTrainedModel) -> nn.Embedding:
    """Return the layer that turns token ids into vectors."""
    return cast(nn.Embedding, model.get_input_embeddings())


def grow_embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    ds_config: Mapping[str, Any] | None = None,
) -> int:
    """Give every token of the tokenizer a row, in the input embedding and the output layer; return the number of rows.

    New rows lie near the mean of the old ones, so that the probabilities of the old tokens hardly change (John Hewitt,
    "Initializing New Word Embeddings for Pretrained Language Models", 2021). They are drawn from ``seed``. A model in
    shards needs its ``ds_config``, and all ranks must call this together.
    """
    old_rows = input_embedding(model).num_embeddings
    if len(tokenizer) <= old_rows:
        return old_rows
    rows = -(-len(tokenizer) // ROWS_TO_MULTIPLE_OF) * ROWS_TO_MULTIPLE_OF  # rounded up
    if in_shards(model):
        _grow_in_shards(model, rows, seed, ds_config)
        return rows
    with torch.random.fork_rng(devices=[]):
        model.resize_token_embeddings(rows, mean_resizing=False)
    for layer in (input_embedding(model), model.get_output_embeddings()):
        if layer is not None:
            layer.weight.data[old_rows:] = _rows_near_the_mean(layer.weight[:old_rows], rows - old_rows, seed)
    return rows


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with more tokens than the model has rows: the vocabulary of a policy is never resized."""
    rows = input_embedding(model).num_embeddings
    if len(tokenizer) > rows:
        raise ModelLoadError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's embedding has {rows} rows: use the tokenizer that "
            "the model was trained with, or resize the model before"
        )


def _grow_in_shards(model: PreTrainedModel, rows: int, seed: int, ds_config: Mapping[str, Any] | None) -> None:
    embedding = input_embedding(model)
    if ds_config is None or model.get_output_embeddings() is not None:
        raise ModelLoadError(
            f"the embedding of {type(model).__name__} has {embedding.num_embeddings} rows and needs {rows}, but it lies in "
            "shards (ZeRO-3): load the model once without, save it, and start from there"
        )
    added = rows - embedding.num_embeddings
    grow_rows(embedding, lambda old: _rows_near_the_mean(old, added, seed), ds_config)
    model.config.get_text_config().vocab_size = rows


def _rows_near_the_mean(old: Float[Tensor, "rows hidden"], count: int, seed: int) -> Float[Tensor, "count hidden"]:
    old = old.detach().float().cpu()
    noise = torch.randn(count, old.shape[1], generator=torch.Generator().manual_seed(seed))
    return old.mean(0) + NOISE * old.std(0) * noise
