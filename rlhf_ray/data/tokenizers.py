"""Making small tokenizers from data, and fingerprints that tell whether two processes or runs have the same tokenizer.

Invariants: a tokenizer made here decodes what it encoded to the very same text (the word tokenizer: texts of the generated
world), has ``<pad>``, ``<eos>`` and ``<unk>`` as its first three tokens, and adds no special token by itself; the same
source gives the same tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from rlhf_ray.config.files.tokenizer_identity import tokenizer_identity
from rlhf_ray.errors import RequestError
from rlhf_ray.rows.read import AnyRow, read_file
from rlhf_ray.rows.sources import as_source, every_split
from rlhf_ray.world import language

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

PAD, EOS, UNK = SPECIAL_TOKENS = ("<pad>", "<eos>", "<unk>")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)
"""Every byte and the special tokens."""


def make_tokenizer(source: str | Path, vocabulary: int = 4096) -> PreTrainedTokenizerFast:
    """The word tokenizer of the generated world (``world``), or a byte-level BPE trained on all text of a data file.

    ``vocabulary`` bounds the BPE; the word tokenizer has as many tokens as the world has words.
    """
    if source == "world":
        return make_word_tokenizer()
    return make_byte_pair_tokenizer(read_texts(source), vocabulary)


def make_word_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each word or mark of the generated world."""
    numbers = {token: number for number, token in enumerate((*SPECIAL_TOKENS, *language.vocabulary()))}
    tokenizer = Tokenizer(models.WordLevel(numbers, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(language.PIECE), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer)


def make_byte_pair_tokenizer(texts: Iterator[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text has ids, and decodes to itself."""
    if vocabulary < SMALLEST_VOCABULARY:
        raise RequestError(
            f"a byte-level BPE needs a vocabulary of at least {SMALLEST_VOCABULARY} tokens, {vocabulary} were asked for"
        )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return _wrap(tokenizer)


def read_texts(path: str | Path) -> Iterator[str]:
    """Every text in the rows of a data file, or of all splits of a data set; messages included."""
    for source in every_split(as_source(path)):
        for row in read_file(source, AnyRow()):
            yield from _texts_in(row.values)


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for entry in value.values():
            yield from _texts_in(entry)
    elif isinstance(value, list):
        for entry in value:
            yield from _texts_in(entry)


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    from transformers import PreTrainedTokenizerFast

    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNK, clean_up_tokenization_spaces=False
    )


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what decides which ids a text gets (see :mod:`rlhf_ray.config.files.tokenizer_identity`).

    Equal hashes mean equal ids for every text; the chat template and padding do not count.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        parts: dict[str, Any] = {
            "class": type(tokenizer).__name__,
            "vocabulary": tokenizer.get_vocab(),
            "added": tokenizer.get_added_vocab(),
        }
    else:
        parts = tokenizer_identity(json.loads(backend.to_str()))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fingerprint_directory(directory: Path) -> str | None:
    """The :func:`fingerprint` of the tokenizer in a model's directory; None of one that has no ``tokenizer.json``."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    parts = tokenizer_identity(json.loads(Tokenizer.from_file(str(path)).to_str()))
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def template_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of what decides how a conversation is written as text: the chat template and the tokens that it names.

    A template that writes ``eos_token`` writes what the tokenizer calls so. The pad token does not count.
    """
    template = tokenizer.chat_template
    named = tokenizer.special_tokens_map.items()
    tokens = {name: str(token) for name, token in named if name != "pad_token" and name in str(template)}
    parts = [template, tokens] if tokens else template
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def encoding_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides which ids a text or a conversation gets, for keys of caches.

    Beside the fingerprint these are the post-processor, the chat template, and the versions of the libraries that run it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        adds: Any = {name: repr(value) for name, value in tokenizer.init_kwargs.items() if "path" not in name}
    else:
        adds = json.loads(backend.to_str()).get("post_processor")
    parts = {
        "vocabulary": fingerprint(tokenizer),
        "adds": adds,
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", False),
        "special": [tokenizer.bos_token_id, tokenizer.eos_token_id],
        "template": tokenizer.chat_template,
        "libraries": [f"{name} {version(name)}" for name in ("tokenizers", "transformers")],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
