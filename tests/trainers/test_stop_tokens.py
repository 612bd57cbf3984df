"""An answer stops at every token that is known to end one, and its text is without the token that stopped it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.ends import EndTokens
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.models import load_end_tokens
from rlhf_ray.trainers.ppo.experience import Experience
from rlhf_ray.trajectories.batch import FinishReason, TrajectoryBatch
from tests.data.chat_templates import SHAPES, make_tokenizer

GEMMA = ChatFormat(make_tokenizer(SHAPES["an end that is not the tokenizer's, and no system"]))
EOS, TURN, NEWLINE, START = GEMMA.tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>", "\n", "<start_of_turn>"])
CHAT_FILES = ("generation_config.json", "config.json")


def ends_of(path: Path, texts: Sequence[str] = (), *, conversations: bool = True) -> EndTokens:
    return load_end_tokens(ModelConfig(path=str(path)), GEMMA, texts, conversations=conversations)


def write_ends(path: Path, **ends: Any) -> None:
    for file in CHAT_FILES:
        if (name := file.removesuffix(".json")) in ends:
            (path / file).write_text(json.dumps(ends[name]))


@pytest.mark.parametrize(
    ("generation", "known"),
    [
        ({"eos_token_id": [EOS, START, 10**6]}, [START]),
        ({"eos_token_id": START}, [START]),
        ({"eos_token_id": [True, None, -1]}, []),
        ({"eos_token_id": None}, []),
        (None, []),
    ],
)
@pytest.mark.parametrize("file", CHAT_FILES)
def test_the_ends_of_tokenizer_template_files_and_run_all_stop_an_answer(
    tmp_path: Path, file: str, generation: dict[str, Any] | None, known: list[int]
) -> None:
    if generation is not None:
        write_ends(tmp_path, **{file.removesuffix(".json"): generation})
    ends = ends_of(tmp_path, ["\n"])
    assert sorted(ends.ids) == sorted([EOS, TURN, NEWLINE, *known])
    assert sorted(ends_of(tmp_path, conversations=False).ids) == sorted([EOS, *known]), "texts end in no turn"
    assert all(ends.named_by[token] == (file,) for token in known)


def test_an_end_of_the_part_about_text_and_of_an_adapters_base_counts(tmp_path: Path) -> None:
    write_ends(tmp_path, config={"model_type": "two", "text_config": {"eos_token_id": [START]}})
    assert START in ends_of(tmp_path).ids
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    write_ends(base, generation_config={"eos_token_id": [EOS, START]})
    assert START in ends_of(adapter).ids


def test_a_class_default_in_config_json_ends_nothing_where_generation_config_knows_better(tmp_path: Path) -> None:
    word = GEMMA.tokenizer("so", add_special_tokens=False)["input_ids"][0]
    write_ends(tmp_path, config={"eos_token_id": [word, START]}, generation_config={"eos_token_id": EOS})
    ends = ends_of(tmp_path)
    assert set(ends.ids) == {EOS, TURN, START}
    assert f"config.json names the end {word}" in ends.left_out[0] and "an ordinary token" in ends.left_out[0]
    write_ends(tmp_path, generation_config={"temperature": 1.0})
    assert word in ends_of(tmp_path).ids, "transformers and vLLM stop there too"


def test_an_end_that_the_tokenizer_does_not_have_is_said_and_left_out(tmp_path: Path) -> None:
    write_ends(tmp_path, generation_config={"eos_token_id": [EOS, 10**6]})
    (reason,) = ends_of(tmp_path).left_out
    assert reason.startswith("generation_config.json names the end 1000000, which is no token of the tokenizer (")


def test_the_text_of_an_answer_is_without_the_token_that_stopped_it() -> None:
    spelled = GEMMA.tokenizer("so", add_special_tokens=False)["input_ids"]
    answers = [[*spelled, TURN], [*spelled, NEWLINE], spelled, [*spelled, NEWLINE]]
    prompt = TokenizedPrompt(0, "p", (5,), messages=({"role": "user", "content": "p"},), tools=({"name": "find"},))
    reasons = [FinishReason.STOP, FinishReason.STOP, FinishReason.LENGTH, FinishReason.LENGTH]
    batch = TrajectoryBatch.from_sequences(
        [[5, *answer] for answer in answers],
        action_mask=[[False, *[True] * len(answer)] for answer in answers],
        prompt_id=[0] * 4,
        sample_index=[0, 1, 2, 3],
        finish_reason=[int(reason) for reason in reasons],
    )
    nothing: Any = None
    experience = Experience(
        nothing,
        groups=nothing,
        preparation=nothing,
        rewards=nothing,
        tokenizer=GEMMA.tokenizer,
        stop_tokens=[TURN, NEWLINE],
    )
    samples = experience.decode(batch, {0: prompt})
    assert [sample.response for sample in samples] == ["so", "so", "so", "so\n"]
    assert all(sample.messages and sample.messages[-1]["content"] == sample.response for sample in samples)
    assert [sample.tools for sample in samples] == [prompt.tools] * 4
