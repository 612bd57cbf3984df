"""Tokenizers made here decode what they encoded, and their fingerprint tells them apart exactly when ids would differ."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from rlhf_ray.data.tokenizers import fingerprint, make_tokenizer, template_fingerprint
from rlhf_ray.errors import DataError, RequestError
from rlhf_ray.world import language
from rlhf_ray.world.generate import World

ROWS = [
    {"chosen": "\n\nHuman: café?\n\nAssistant: Sure, here it is — “ok” 🙂.", "rejected": "no"},
    {"chosen": [{"role": "user", "content": "zebra zebra zebra"}], "count": 3, "none": None},
] * 20


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return make_tokenizer("world")


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    return path


@pytest.fixture(scope="module")
def byte_pairs(rows_file: Path) -> PreTrainedTokenizerFast:
    return make_tokenizer(rows_file, vocabulary=320)


def world_texts() -> list[str]:
    world = World(5)
    rows = [*world.demonstrations(400), *world.arithmetic_demonstrations(100)]
    pairs = [side for pair in world.preferences(300) for side in (pair.chosen, pair.rejected)]
    return [text for row in rows for text in (row.prompt, row.answer)] + pairs


def test_every_text_of_the_world_is_one_token_a_word_and_comes_back(words: PreTrainedTokenizerFast) -> None:
    for text in world_texts():
        ids = words(text)["input_ids"]
        assert words.unk_token_id not in ids
        assert words.convert_ids_to_tokens(ids) == language.pieces(text)
        assert words.decode(ids) == text


def test_a_prompt_and_its_answer_have_the_same_ids_alone_and_joined(words: PreTrainedTokenizerFast) -> None:
    for row in World(5).demonstrations(100):
        alone = words(row.prompt)["input_ids"] + words(row.answer)["input_ids"]
        assert words(row.prompt + row.answer)["input_ids"] == alone


@pytest.mark.parametrize("name", ["words", "byte_pairs"])
def test_special_tokens_come_first_and_are_never_added(name: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(name)
    assert [tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id] == [0, 1, 2]
    assert tokenizer.bos_token_id is None
    ids = tokenizer("Hello.")["input_ids"]
    assert not set(ids) & {0, 1, 2}
    assert tokenizer.decode([0, *ids, 1], skip_special_tokens=True) == "Hello."


def test_a_word_from_elsewhere_is_unknown(words: PreTrainedTokenizerFast) -> None:
    assert words("Hello zebra.")["input_ids"][1] == words.unk_token_id


@settings(max_examples=100, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_a_byte_level_tokenizer_encodes_and_returns_any_text(byte_pairs: PreTrainedTokenizerFast, text: str) -> None:
    ids = byte_pairs(text)["input_ids"]
    assert byte_pairs.unk_token_id not in ids
    assert byte_pairs.decode(ids) == text


def test_a_byte_level_tokenizer_learns_from_every_text_of_the_rows(byte_pairs: PreTrainedTokenizerFast) -> None:
    assert len(byte_pairs) <= 320
    assert byte_pairs.tokenize("zebra zebra") == ["zebra", "Ġzebra"]
    assert len(byte_pairs("\n\nAssistant: Sure")["input_ids"]) < 10


def test_the_same_source_gives_the_same_tokenizer(rows_file: Path, byte_pairs: PreTrainedTokenizerFast) -> None:
    assert fingerprint(make_tokenizer(rows_file, vocabulary=320)) == fingerprint(byte_pairs)
    assert fingerprint(make_tokenizer("world")) == fingerprint(make_tokenizer("world", vocabulary=17))


def test_saving_and_loading_changes_neither_ids_nor_fingerprint(
    words: PreTrainedTokenizerFast, byte_pairs: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    text = "Hello. I am Anna. My kettle never came.\n"
    for number, tokenizer in enumerate((words, byte_pairs)):
        tokenizer.save_pretrained(tmp_path / str(number))
        loaded = AutoTokenizer.from_pretrained(tmp_path / str(number))
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"]) == text
        assert fingerprint(loaded) == fingerprint(tokenizer)


def test_the_fingerprint_sees_what_decides_ids_and_nothing_else(
    words: PreTrainedTokenizerFast, byte_pairs: PreTrainedTokenizerFast, rows_file: Path
) -> None:
    same = copy.deepcopy(byte_pairs)
    same.chat_template = "{{ messages }}"
    same.padding_side = "left"
    same("Hello", padding="max_length", truncation=True, max_length=4)
    assert fingerprint(same) == fingerprint(byte_pairs)
    more_tokens = copy.deepcopy(byte_pairs)
    more_tokens.add_tokens(["zebras"])
    fewer_merges = make_tokenizer(rows_file, vocabulary=300)
    assert len({fingerprint(tokenizer) for tokenizer in (words, byte_pairs, more_tokens, fewer_merges)}) == 4


def test_a_tokenizer_in_plain_python_has_a_fingerprint_too() -> None:
    assert fingerprint(ByT5Tokenizer()) == fingerprint(ByT5Tokenizer())
    assert fingerprint(ByT5Tokenizer()) != fingerprint(ByT5Tokenizer(extra_ids=7))


def test_what_cannot_be_made_is_told(rows_file: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="vocabulary of at least 259 tokens, 100 were asked for"):
        make_tokenizer(rows_file, vocabulary=100)
    with pytest.raises(DataError, match=r"nowhere\.jsonl"):
        make_tokenizer(tmp_path / "nowhere.jsonl")


def test_the_template_has_a_fingerprint_of_its_own(words: PreTrainedTokenizerFast) -> None:
    templated = copy.deepcopy(words)
    templated.chat_template = "{{ messages }}"
    assert template_fingerprint(templated) != template_fingerprint(words)
    assert template_fingerprint(copy.deepcopy(templated)) == template_fingerprint(templated)
