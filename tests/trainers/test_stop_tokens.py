"""An answer stops at every token that is known to end one, and its text is without the token that stopped it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.loading import parse_config
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.trainers.ppo.build import find_stop_tokens
from rlhf_ray.trainers.ppo.experience import Experience
from rlhf_ray.trajectories.batch import FinishReason, TrajectoryBatch
from tests.data.chat_templates import SHAPES, make_tokenizer

GEMMA = ChatFormat(make_tokenizer(SHAPES["an end that is not the tokenizer's, and no system"]))
EOS, TURN, NEWLINE, START = GEMMA.tokenizer.convert_tokens_to_ids(["<eos>", "<end_of_turn>", "\n", "<start_of_turn>"])
CONFIG = """
kind: ppo
run: {name: small}
steps: 3
policy: {model: {path: PATH}, engine: {optimizer: {learning_rate: 1e-3}}}
critic: null
reward: {function: exact_match}
rollout: {stop_tokens: STOPS}
data: {path: rows.jsonl}
batch: {prompts_per_step: 16, samples_per_prompt: 2, sequences_per_update: 8}
algorithm: {name: grpo}
"""


def config(path: Path, stops: str = "[]") -> Any:
    return parse_config(CONFIG.replace("PATH", str(path)).replace("STOPS", stops))


@pytest.mark.parametrize(
    ("generation", "known"),
    [
        ({"eos_token_id": [EOS, START, 10**6]}, [START]),
        ({"eos_token_id": START}, [START]),
        ({"eos_token_id": None}, []),
        (None, []),
    ],
)
def test_the_ends_of_tokenizer_template_generation_config_and_run_all_stop_an_answer(
    tmp_path: Path, generation: dict[str, Any] | None, known: list[int]
) -> None:
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
    ends = find_stop_tokens(config(tmp_path, r'["\n"]'), GEMMA, conversations=True)
    assert sorted(ends) == sorted([EOS, TURN, NEWLINE, *known])
    texts = find_stop_tokens(config(tmp_path), GEMMA, conversations=False)
    assert sorted(texts) == sorted([EOS, *known]), "texts end in no turn"


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
