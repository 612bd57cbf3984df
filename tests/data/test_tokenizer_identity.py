"""``check`` and a run have one rule for "the same tokenizer": whatever part decides the ids of a text, both see it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rlhf_ray.config.files.tokenizer_identity import same_tokenizer_files, tokenizer_identity
from rlhf_ray.data.tokenizers import fingerprint

VOCABULARY = {"a": 0, "b": 1, "a b": 2, "[UNK]": 3, "<s>": 4, "</s>": 5}
AROUND = [("<s>", 4), ("</s>", 5)]

Change = Callable[[Tokenizer], Any]


def make(change: Change = lambda _: None, vocabulary: Mapping[str, int] = VOCABULARY) -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    change(tokenizer)
    return tokenizer


def set_part(part: str, value: Any) -> Change:
    return lambda tokenizer: setattr(tokenizer, part, value)


def template(single: str) -> Change:
    return set_part("post_processor", processors.TemplateProcessing(single=single, special_tokens=AROUND))


OTHERS = {
    "the model": (make(vocabulary={**VOCABULARY, "a": 1, "b": 0}), "a b"),
    "an added token behind the pad token": (
        make(lambda tokenizer: tokenizer.add_tokens([AddedToken("<|pad|>", special=True), AddedToken("ab")])),
        "ab",
    ),
    "an added token": (make(lambda tokenizer: tokenizer.add_tokens([AddedToken("ab")])), "ab"),
    "the normalizer": (make(set_part("normalizer", normalizers.Lowercase())), "A b"),
    "the pre-tokenizer": (make(set_part("pre_tokenizer", None)), "a b"),
    "a token before each text": (make(template("<s> $A")), "a b"),
    "a token after each text": (make(template("$A </s>")), "a b"),
    "tokens by Bert's rule": (
        make(set_part("post_processor", processors.BertProcessing(("</s>", 5), ("<s>", 4)))),
        "a b",
    ),
    "two steps afterwards": (
        make(
            set_part(
                "post_processor",
                processors.Sequence(
                    [processors.ByteLevel(), processors.TemplateProcessing("<s> $A", special_tokens=AROUND)]
                ),
            )
        ),
        "a b",
    ),
}
SAME = {
    "itself": make(),
    "offsets that are trimmed": make(set_part("post_processor", processors.ByteLevel(trim_offsets=True))),
    "a template that adds nothing": make(template("$A")),
    "padding": make(lambda tokenizer: tokenizer.enable_padding(pad_id=3, pad_token="[UNK]")),
    "the pad token of a reward model that was trained here": make(
        lambda tokenizer: tokenizer.add_special_tokens([AddedToken("<|pad|>", special=True)])
    ),
    "truncation": make(lambda tokenizer: tokenizer.enable_truncation(1)),
}


def verdicts(one: Tokenizer, other: Tokenizer, folder: Path) -> tuple[bool, bool]:
    """Whether two tokenizers are the same: by ``check``, which reads files, and by the fingerprint of a run."""
    files = folder / "one.json", folder / "other.json"
    for file, tokenizer in zip(files, (one, other), strict=True):
        tokenizer.save(str(file))
    loaded = [PreTrainedTokenizerFast(tokenizer_file=str(file), pad_token="[UNK]") for file in files]
    return same_tokenizer_files(*files), fingerprint(loaded[0]) == fingerprint(loaded[1])


@pytest.mark.parametrize("part", OTHERS)
def test_check_and_the_fingerprint_see_each_part_that_decides_ids(part: str, tmp_path: Path) -> None:
    other, text = OTHERS[part]
    assert make().encode(text).ids != other.encode(text).ids
    assert verdicts(make(), other, tmp_path) == (False, False)


@pytest.mark.parametrize("part", SAME)
def test_check_and_the_fingerprint_agree_that_other_parts_do_not_count(part: str, tmp_path: Path) -> None:
    assert verdicts(make(), SAME[part], tmp_path) == (True, True)


def test_the_same_ids_added_in_two_ways_are_the_same_tokenizer(tmp_path: Path) -> None:
    by_bert = OTHERS["tokens by Bert's rule"][0]
    assert verdicts(by_bert, make(template("<s> $A </s>")), tmp_path) == (True, True)


def test_a_file_of_an_older_library_is_the_same_tokenizer(tmp_path: Path) -> None:
    """Older versions wrote merges as texts and left defaults out."""
    new = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
    description = json.loads(new.to_str())
    old = {**description, "model": {"type": "BPE", "vocab": description["model"]["vocab"], "merges": ["a b"]}}
    files = tmp_path / "new.json", tmp_path / "old.json"
    for file, content in zip(files, (description, old), strict=True):
        file.write_text(json.dumps(content))
    assert tokenizer_identity(description) != tokenizer_identity(old)
    assert same_tokenizer_files(*files)


def test_a_post_processor_of_an_unknown_kind_counts_as_a_whole() -> None:
    one, other = ({"post_processor": {"type": "Later", "adds": adds}} for adds in (1, 2))
    assert tokenizer_identity(one) == tokenizer_identity(dict(one))
    assert tokenizer_identity(one) != tokenizer_identity(other)


EMPTY_PIECE = {"type": "TemplateProcessing", "single": [{}], "special_tokens": {}}


@pytest.mark.parametrize("broken", [3, [], {"type": "Sequence", "processors": None}, EMPTY_PIECE])
def test_a_post_processor_that_is_broken_is_compared_and_not_an_error(broken: object) -> None:
    assert tokenizer_identity({"post_processor": broken}) == tokenizer_identity({"post_processor": broken})
    assert tokenizer_identity({"post_processor": broken}) != tokenizer_identity({})
