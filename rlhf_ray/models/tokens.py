"""Tokenizers of models: loading, the pad token, and embeddings that hold every token.

Always true: the pad token is the tokenizer's own or a dedicated one, never another token unless that was asked for;
embeddings grow to a multiple of 8 where the tokenizer has more tokens than rows, and never shrink.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ray.config.schema import ModelConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.checkpoint import find_directory
from rlhf_ray.models.sharded import in_shards

PAD_TOKEN = "<|pad|>"
ROWS_TO_MULTIPLE_OF = 8


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a model: from its directory, or made as the model is made."""
    if config.make is not None:
        from rlhf_ray.data.tokenizers import make_tokenizer

        return make_tokenizer(config.make.tokenizer_from, config.make.vocabulary)
    assert config.path is not None
    directory = find_directory(config.path, config.revision)
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


def grow_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, seed: int = 0) -> int:
    """Give every token of the tokenizer a row; return the number of rows. New rows are drawn from ``seed``."""
    rows: int = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        if in_shards(model):
            raise ModelLoadError(
                f"the tokenizer has {len(tokenizer)} tokens and the embedding {rows} rows, which cannot grow in shards "
                "(ZeRO-3): load the model once without, save it, and start from there"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=ROWS_TO_MULTIPLE_OF)
        rows = model.get_input_embeddings().num_embeddings
    return rows


def prepare_padding(
    model: Any, tokenizer: PreTrainedTokenizerBase, *, pad_with_eos: bool = False, seed: int = 0
) -> PreTrainedTokenizerBase:
    """Make ``tokenizer`` and ``model`` able to pad: a pad token, a row for it, and its id in the model's config."""
    add_pad_token(tokenizer, pad_with_eos=pad_with_eos)
    grow_embeddings(model, tokenizer, seed=seed)
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
