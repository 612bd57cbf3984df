"""Tokenizers that the tests of this room read with."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_ray.data.tokenizers import make_tokenizer


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    """A byte-level BPE that knows a few words, and adds no special token."""
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    texts = ["\n\nHuman: how are you today?\n\nAssistant: I am fine, thank you.", "the cat sat there"] * 5
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return make_tokenizer(str(path), 400)


@pytest.fixture(scope="session")
def spaced_tokenizer() -> Callable[[str], PreTrainedTokenizerFast]:
    """Make a tokenizer of letters and "th" that puts a space before every text, as SentencePiece does, and special tokens."""
    letters = ["<s>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz?.:", "th"]

    def make(template: str) -> PreTrainedTokenizerFast:
        tokenizer = Tokenizer(
            models.BPE({letter: number for number, letter in enumerate(letters)}, [("t", "h")], unk_token="<unk>")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        tokenizer.decoder = decoders.Metaspace()
        special = [("<s>", 0), ("</s>", 1)]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=special)
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")

    return make
