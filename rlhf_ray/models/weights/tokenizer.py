"""Tokenizers of models: loading, the pad token, and embeddings that hold every token.

Always true: the pad token is the tokenizer's own or a dedicated one, never another token unless that was asked for;
embeddings grow to a multiple of 8 where the tokenizer has more tokens than rows, and never shrink.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ray.config.preflight import TOKENIZER_FILES
from rlhf_ray.config.schema import ModelConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.forward.shards import in_shards
from rlhf_ray.models.weights.checkpoint import base_of, find_directory
from rlhf_ray.models.weights.sharded import grow_rows

PAD_TOKEN = "<|pad|>"
ROWS_TO_MULTIPLE_OF = 8
NEAR = 0.01
"""How far new rows lie from the mean, in deviations of the old ones."""


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model: from its directory, or made as the model is made."""
    if config.make is not None:
        from rlhf_ray.data.tokenizers import make_tokenizer

        return make_tokenizer(config.make.tokenizer_from, config.make.vocabulary)
    assert config.path is not None
    directory = find_directory(config.path, config.revision)
    base = base_of(directory)
    if base is not None and not any((directory / name).is_file() for name in TOKENIZER_FILES):
        directory = find_directory(*base)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=config.trust_remote_code
        )
    except (ValueError, OSError, KeyError) as error:
        raise ModelLoadError(f"{directory} has no tokenizer that can be read: {error}") from error
    return tokenizer


def add_pad_token(tokenizer: PreTrainedTokenizerBase, *, pad_with_eos: bool = False) -> bool:
    """Give a tokenizer without pad token a dedicated one; return whether the vocabulary has grown.

    ``pad_with_eos`` uses the end-of-sequence token instead. Scores stay right even then: they are read at the last
    *attended* token.
    """
    if tokenizer.pad_token_id is not None:
        return False
    if pad_with_eos:
        if tokenizer.eos_token_id is None:
            raise ModelLoadError("padding with the end-of-sequence token was asked for, but the tokenizer has none")
        get_logger(__name__).warning(
            "padding with %s, as asked: readers that look for the first pad token in a text "
            "will take its end for padding",
            tokenizer.eos_token,
        )
        tokenizer.pad_token = tokenizer.eos_token
        return False
    before = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return len(tokenizer) > before


def grow_embeddings(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    ds_config: Mapping[str, Any] | None = None,
) -> int:
    """Give every token of the tokenizer a row; return the number of rows.

    New rows lie near the mean of the old ones (Hewitt 2021: then the probabilities of other tokens stay what they were)
    and are drawn from ``seed``. A model in shards needs its ``ds_config``, on all ranks together.
    """
    old: int = model.get_input_embeddings().num_embeddings
    if len(tokenizer) <= old:
        return old
    rows = -(-len(tokenizer) // ROWS_TO_MULTIPLE_OF) * ROWS_TO_MULTIPLE_OF
    if in_shards(model):
        _grow_in_shards(model, rows, seed, ds_config)
    else:
        with torch.random.fork_rng(devices=[]):
            model.resize_token_embeddings(rows, mean_resizing=False)
        for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
            if layer is not None:
                layer.weight.data[old:] = _rows_near_the_mean(layer.weight[:old], rows - old, seed)
    return rows


def _grow_in_shards(model: PreTrainedModel, rows: int, seed: int, ds_config: Mapping[str, Any] | None) -> None:
    embedding = model.get_input_embeddings()
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
    return old.mean(0) + NEAR * old.std(0) * noise


def prepare_padding(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    pad_with_eos: bool = False,
    seed: int = 0,
    ds_config: Mapping[str, Any] | None = None,
) -> PreTrainedTokenizerBase:
    """Make ``tokenizer`` and ``model`` able to pad: a pad token, a row for it, and its id in the model's config."""
    add_pad_token(tokenizer, pad_with_eos=pad_with_eos)
    grow_embeddings(model, tokenizer, seed=seed, ds_config=ds_config)
    model.config.pad_token_id = tokenizer.pad_token_id
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return tokenizer


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with more tokens than the model has rows: a policy's vocabulary is never resized."""
    rows = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ModelLoadError(
            f"the tokenizer has {len(tokenizer)} tokens, but the model's embedding has {rows} rows: use "
            "the tokenizer that the model was trained with, or resize the model before"
        )
