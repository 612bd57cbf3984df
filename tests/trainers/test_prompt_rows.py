"""Prompts as a run samples from them: texts as they are, conversations as the policy's chat template writes them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from rlhf_ray.config.sections.data import DataConfig, WorldConfig
from rlhf_ray.data.load import load_prompts
from rlhf_ray.data.tokenizers import make_tokenizer
from rlhf_ray.errors import DataError

TEMPLATE = (
    "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def written(directory: Path, *rows: dict[str, object]) -> str:
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_conversations_are_sampled_from_as_the_template_writes_them(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Hello. What now?"}]
    path = written(tmp_path, {"prompt": turns, "label": "7", "source": "talk"}, {"prompt": "Hello.", "source": "text"})
    tokenizer = make_tokenizer(path, vocabulary=280)
    tokenizer.chat_template = TEMPLATE
    talk, text = load_prompts(DataConfig(path=path, evaluation_fraction=0.0), tokenizer, 0).train
    rendered = "[user]Hello. What now?[assistant]"
    assert (talk.text, talk.label, talk.source, talk.messages) == (rendered, "7", "talk", tuple(turns))
    assert list(talk.token_ids) == tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert (text.text, text.messages, text.source) == ("Hello.", None, "text")

    config = DataConfig(path=path, evaluation_fraction=0.0, apply_chat_template=True)
    _, turned = load_prompts(config, tokenizer, 0).train
    assert turned.text == "[user]Hello.[assistant]" and turned.messages == ({"role": "user", "content": "Hello."},)


def test_texts_that_pass_by_a_template_are_told_once(tmp_path: Path, project_log: io.StringIO) -> None:
    path = written(tmp_path, {"prompt": "Hello."}, {"prompt": [{"role": "user", "content": "Hello."}]})
    tokenizer = make_tokenizer(path, vocabulary=280)
    tokenizer.chat_template = TEMPLATE
    for turns, told in ((False, ["1 of 2 prompts are plain texts"]), (True, [])):
        project_log.seek(project_log.truncate(0))
        load_prompts(DataConfig(path=path, evaluation_fraction=0.0, apply_chat_template=turns), tokenizer, 0)
        assert [message for message in told if message in project_log.getvalue()] == told
        assert project_log.getvalue().count("plain texts") == len(told)


def test_a_conversation_without_a_template_is_told_by_its_row(tmp_path: Path) -> None:
    path = written(tmp_path, {"prompt": [{"role": "user", "content": "Hello."}]})
    with pytest.raises(DataError, match=r"rows\.jsonl:1: holds a conversation, but the tokenizer has no chat template"):
        load_prompts(DataConfig(path=path, evaluation_fraction=0.0), make_tokenizer("world"), 0)


def test_prompts_over_the_limit_are_dropped_and_keep_the_numbers_of_the_others(tmp_path: Path) -> None:
    rows = [{"prompt": "Hello. " * count} for count in (1, 9, 2)]
    config = DataConfig(path=written(tmp_path, *rows), evaluation_fraction=0.0, max_prompt_tokens=8)
    split = load_prompts(config, make_tokenizer("world"), 0)
    assert [prompt.prompt_id for prompt in split.train] == [0, 2]
    assert split.dropped == {"too long": 1} and split.parts[0].size == 2


def test_the_worlds_sums_are_prompts_with_labels_on_both_sides() -> None:
    world = WorldConfig(task="arithmetic", prompts=50, evaluation_prompts=20)
    split = load_prompts(DataConfig(world=world), make_tokenizer("world"), 0)
    assert (len(split.train), len(split.held_out)) == (50, 20)
    assert all(prompt.label is not None and prompt.source == "world/arithmetic" for prompt in split.train)
    assert not {prompt.text for prompt in split.train} & {prompt.text for prompt in split.held_out}
