"""Loading answers with labels: the other answer that each is compared with, and what is said of rows that lose something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.sections.data import DataConfig
from rlhf_ray.data.load import load_judged
from rlhf_ray.data.tokenizers import make_tokenizer
from rlhf_ray.errors import DataError

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content.split('</think>')[-1] }}{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text(json.dumps({"text": "what is it? it is this, it is that"}) + "\n")
    return make_tokenizer(str(path), 300)


def load(folder: Path, tokenizer: Any, rows: list[dict[str, Any]], held_out: list[dict[str, Any]], **keys: Any) -> Any:
    for name, content in (("train", rows), ("held", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    evaluation = {"evaluation_path": str(folder / "held.jsonl")} if held_out else {"evaluation_fraction": 0.0}
    data = {"path": str(folder / "train.jsonl"), "cache": None, **evaluation, **keys}
    return load_judged(DataConfig.model_validate(data), tokenizer, 0)


def row(prompt: Any, answer: Any, label: bool = True) -> dict[str, Any]:
    return {"prompt": prompt, "answer": answer, "label": label}


TRAIN = [row(f"what is {number}?", f" this {number}", number % 2 == 0) for number in range(4)]


def test_held_out_answers_to_one_prompt_are_compared_with_answers_that_are_trained_on(
    tmp_path: Path, tokenizer: Any
) -> None:
    """With answers held out to other prompts wherever there is one."""
    trained = {tuple(one.answer) for one in load(tmp_path, tokenizer, TRAIN, []).train}
    alone = load(tmp_path, tokenizer, TRAIN, [row("is it?", " yes"), row("is it?", " no", False)]).held_out
    assert len(alone) == 2 and {tuple(one.other_answer) for one in alone} <= trained
    assert len({tuple(one.other_answer) for one in alone}) == 2, "not one answer for all of them"
    mixed = load(tmp_path, tokenizer, TRAIN, [row("is it?", " yes"), row("was it?", " no", False)]).held_out
    assert [tuple(one.other_answer) for one in mixed] == [tuple(mixed[1].answer), tuple(mixed[0].answer)]


def test_training_answers_to_one_prompt_are_refused_whatever_is_held_out(tmp_path: Path, tokenizer: Any) -> None:
    same = [row("what?", f" {number}", number % 2 == 0) for number in range(4)]
    with pytest.raises(DataError, match="all 4 answers have the same prompt, and KTO compares with answers to other"):
        load(tmp_path, tokenizer, same, [row("is it?", " yes")])


def test_prompts_that_are_cut_are_counted(tmp_path: Path, tokenizer: Any, project_log: Any) -> None:
    rows = [*TRAIN, row("what is it? " * 40, " this")]
    split = load(tmp_path, tokenizer, rows, [row("is it? " * 40, " yes")], max_tokens=60, too_long="cut_prompt")
    assert len(split.train) == 5 and all(len(one.prompt) + len(one.answer) <= 60 for one in split.train)
    assert f"{tmp_path}/train.jsonl: 2 prompts were cut at their beginning (data.too_long)" in project_log.getvalue()


def test_what_a_template_leaves_out_of_an_answer_is_said(
    tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, project_log: Any
) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", TEMPLATE)
    question = [{"role": "user", "content": "what is it?"}]
    calls = [{"type": "function", "function": {"name": "clock", "arguments": {}}}]
    rows = [row([{"role": "user", "content": f"{number}?"}], [{"role": "assistant", "content": "yes"}], False)
            for number in range(3)]  # fmt: skip
    rows.append(row(question, [{"role": "assistant", "content": "this", "tool_calls": calls}]))
    load(tmp_path, tokenizer, rows, [])
    assert (
        f"the chat template leaves out calls of tools in 1 of 4 conversations, such as {tmp_path}/train.jsonl:4: "
        "choose a model whose template writes calls" in project_log.getvalue()
    )


@pytest.mark.parametrize(
    ("answers", "way_out"),
    [([" this" * 99] * 2, r"\(2 too long\); raise data\.max_tokens, or give other rows$")],
)
def test_no_row_that_is_left_names_its_way_out(
    tmp_path: Path, tokenizer: Any, answers: list[str], way_out: str
) -> None:
    with pytest.raises(DataError, match=way_out):
        load(tmp_path, tokenizer, [row("what?", answer) for answer in answers], [], max_tokens=50)
