"""``rlhf-ray export``: write a plain Hugging Face directory from a run, a model directory or an adapter.

Invariants: the directory appears whole or not at all, with merged adapters, a score head called ``score``, safetensors and a
tokenizer; nothing that exists is overwritten; the command says so if plain transformers or vLLM could not read the result or
would compute other scores.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from transformers import PreTrainedTokenizerBase

from rlhf_ray import storage
from rlhf_ray.config.files.encoders import encoder_type
from rlhf_ray.config.recipes import CONFIG_NAME
from rlhf_ray.config.sections.models import Dtype, ModelConfig
from rlhf_ray.config.sections.roles import ScoredToken
from rlhf_ray.console import get_logger
from rlhf_ray.environment import expand_home
from rlhf_ray.errors import ModelLoadError, RequestError
from rlhf_ray.models import (
    SequenceRegression,
    load_policy,
    load_regression,
    load_reward_reading,
    load_tokenizer,
    save_pretrained,
)
from rlhf_ray.models.dtypes import LONG_NAMES
from rlhf_ray.models.head_layouts import holds_scoring_model
from rlhf_ray.models.reward_reading import end_token_id
from rlhf_ray.models.weights.checkpoint import HEAD_NAME, NOT_BUILT, Checkpoint
from rlhf_ray.models.weights.tokenizer import LONGEST_REASON, add_pad_token

FINAL = "final"


def export(
    source: str,
    target: str,
    *,
    dtype: Dtype | None = None,
    head_prefix: str = HEAD_NAME,
    scored_token: Literal["end", "before_end"] | None = None,
    trust_remote_code: bool = False,
) -> Path:
    """Write ``source`` (a run directory, a model directory, an adapter, a hub id) to ``target``, a new directory.

    ``dtype`` defaults to the one that the files store; ``head_prefix`` names the head for OpenRLHF. ``scored_token`` says at
    which token a reward model that does not remember it is read; what is written is read there by transformers too.
    """
    path = _model_directory(source)
    with _told(path):
        return _export(path, target, dtype, head_prefix, scored_token, trust_remote_code)


@contextmanager
def _told(path: str) -> Iterator[None]:
    """Turn what a library raises on the files of a model, whatever it is, into a :class:`ModelLoadError` about them."""
    try:
        yield
    except (*NOT_BUILT, LookupError, RecursionError, RuntimeError) as error:
        if isinstance(error, OSError) and error.filename is not None:
            raise  # about a path
        at = traceback.extract_tb(error.__traceback__)[-1]
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise ModelLoadError(
            f"{path} cannot be exported, its files are not as those of a model are: {type(error).__name__}: {reason} "
            f"({Path(at.filename).name}:{at.lineno})"
        ) from error


def _export(
    path: str,
    target: str,
    dtype: Dtype | None,
    head_prefix: str,
    scored_token: Literal["end", "before_end"] | None,
    trust_remote_code: bool,
) -> Path:
    if os.path.lexists(target):
        raise RequestError(
            f"{target} exists already, and nothing is written over: remove it, or name another directory"
        )
    checkpoint = Checkpoint.open(path, trust_remote_code=trust_remote_code)
    _refuse_encoder(path, checkpoint)
    scored = holds_scoring_model(checkpoint, checkpoint.raw_config().get("value_head_prefix") or HEAD_NAME)
    for option, value, default in (("--head-prefix", head_prefix, HEAD_NAME), ("--scored-token", scored_token, None)):
        if value != default and not scored:
            raise RequestError(f"{option} is about a score head, but {path} has none: leave it out")
    config = ModelConfig(path=path, dtype=dtype or _stored_dtype(checkpoint), trust_remote_code=trust_remote_code)
    tokenizer = load_tokenizer(config)
    model = _load_reward_model(config, tokenizer, scored_token) if scored else load_policy(config)
    pending = storage.begin_directory(target)
    try:
        save_pretrained(model, tokenizer, pending.path, head_prefix=head_prefix)
        pending.commit()
    except BaseException:
        pending.abort()
        raise
    merged = f", the adapter {checkpoint.adapter} merged" if checkpoint.adapter is not None else ""
    kind = f"score head {head_prefix}" if scored else "language model"
    get_logger(__name__).info("wrote %s: %s in %s, %s%s", target, path, config.dtype, kind, merged)
    written: Path = pending.target
    return written


def _refuse_encoder(path: str, checkpoint: Checkpoint) -> None:
    """An encoder has nothing to be exported: it lies as transformers reads it, and is not trained here."""
    kind = encoder_type(checkpoint.raw_config())
    if kind is not None:
        raise RequestError(
            f"{path} is an encoder ({kind}), which this project scores with as it lies and never changes: copy its directory"
        )


def _load_reward_model(
    config: ModelConfig, tokenizer: PreTrainedTokenizerBase, scored_token: ScoredToken | None
) -> SequenceRegression:
    """The model and its tokenizer with such a pad token that transformers, which skips it, reads where this project does."""
    reading = load_reward_reading(config, tokenizer, scored_token=scored_token)
    end = end_token_id(tokenizer, reading.end_token)
    if reading.scored_token != "before_end":
        add_pad_token(tokenizer, ends=() if end is None else (end,))
    elif tokenizer.pad_token_id != end:
        tokenizer.pad_token = reading.end_token
    get_logger(__name__).info("%s %s", config.path, reading.sentence())
    if reading.tail:
        get_logger(__name__).warning(
            "the chat template writes %r after %r, where a score is read: programs that give all of it to "
            "AutoModelForSequenceClassification read another token; cut their text after %s",
            reading.tail,
            reading.end_token,
            reading.end_token,
        )
    for warning in reading.warnings:
        get_logger(__name__).warning("%s", warning)
    return load_regression(config, "reward", tokenizer=tokenizer)


def _model_directory(source: str) -> str:
    """The model directory of a run; anything else as it is."""
    directory = expand_home(source)
    if not (directory / CONFIG_NAME).is_file():
        return source
    if not (directory / FINAL).is_dir():
        raise RequestError(
            f"run {source} has no {FINAL}/ yet, which is written at its end: rlhf-ray resume {source} goes on with it"
        )
    return str(directory / FINAL)


def _stored_dtype(checkpoint: Checkpoint) -> Dtype:
    """The dtype of most of the numbers in its files, whatever its config says."""
    stored = checkpoint.stored_dtype()
    return next((name for name, known in LONG_NAMES.items() if known == stored), "fp32")
