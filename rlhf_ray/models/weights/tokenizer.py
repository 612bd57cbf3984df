"""Loading the tokenizer of a model, and giving it a pad token.

Invariants: the pad token is the tokenizer's own or a dedicated one, and never another token unless the caller asks for it. Of
a reward model that is read at the end of an answer, the pad token ends no answer: transformers reads a score at the last
token that is not the pad token.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf_ray.config.files.models import TOKENIZER_FILES, read_json
from rlhf_ray.config.files.positions import text_part
from rlhf_ray.config.files.tokenizer_identity import PAD_TOKEN
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.console import get_logger
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.ends import CONFIG, GENERATION_CONFIG, EndTokens, find_end_tokens
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.weights.checkpoint import find_base, find_directory
from rlhf_ray.models.weights.embeddings import grow_embeddings

LONGEST_REASON = 300
"""Letters of what a library says that are passed on."""


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model from its directory, or make it if the config makes the model.

    An adapter without a tokenizer has that of its base.
    """
    if config.make is not None:
        from rlhf_ray.data.tokenizers import make_tokenizer

        return make_tokenizer(config.make.tokenizer_from, config.make.vocabulary)
    assert config.path is not None
    directory = find_directory(config.path, config.revision)
    base = find_base(directory)
    if base is not None and not any((directory / name).is_file() for name in TOKENIZER_FILES):
        directory = find_directory(*base)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=config.trust_remote_code
        )
    except Exception as error:  # the libraries raise what they like, bare Exceptions among it
        reason = " ".join(str(error).split())[:LONGEST_REASON]
        raise ModelLoadError(
            f"{directory} has no tokenizer that can be read beside its config.json: {reason}"
        ) from error
    return tokenizer


def load_end_tokens(config: ModelConfig, chat: ChatFormat, texts: Sequence[str], *, conversations: bool) -> EndTokens:
    """The tokens that end an answer of the policy ``config``, whose tokenizer ``chat`` has.

    ``texts`` are those of ``rollout.stop_tokens``; ``conversations`` says whether there are any among the prompts.
    """
    return find_end_tokens(chat, _recorded_ends(config), texts, conversations=conversations)


def _recorded_ends(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The ids that end a text by the files of a model, by the names of the files; an adapter has those of its base too."""
    if config.path is None:
        return {}
    directory = find_directory(config.path, config.revision)
    base = find_base(directory)
    directories = [directory] if base is None else [directory, find_directory(*base)]
    ends = {
        name: [end for folder in directories for end in _ends_in(read_json(folder / name))]
        for name in (GENERATION_CONFIG, CONFIG)
    }
    return {name: tuple(dict.fromkeys(found)) for name, found in ends.items() if found}


def _ends_in(content: Any) -> list[int]:
    """The value of ``eos_token_id``, one id or several, of a config or of the part of it that is about text."""
    if not isinstance(content, dict):
        return []
    ends = content.get("eos_token_id")
    if ends is None:
        ends = text_part(content).get("eos_token_id")
    return [end for end in (ends if isinstance(ends, list) else [ends]) if type(end) is int]


def add_pad_token(
    tokenizer: PreTrainedTokenizerBase, *, pad_with_eos: bool = False, ends: Collection[int] = ()
) -> bool:
    """Give a tokenizer without a pad token a dedicated one; return whether the vocabulary has grown.

    One that pads with one of ``ends``, the tokens that end an answer, gets a dedicated one too. ``pad_with_eos`` uses the
    end-of-sequence token instead. Scores are correct even then, since they are read at the last *attended* token.
    """
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return False
    if pad_with_eos:
        if tokenizer.eos_token_id is None:
            raise ModelLoadError(
                "pad_with_eos is set, but the tokenizer has none: leave it out to get a dedicated pad token"
            )
        get_logger(__name__).warning(
            "padding with %s, since pad_with_eos is set: readers that look for the first pad token in a text "
            "will take its end for padding",
            tokenizer.eos_token,
        )
        tokenizer.pad_token = tokenizer.eos_token
        return False
    before = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": PAD_TOKEN})
    return len(tokenizer) > before


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
