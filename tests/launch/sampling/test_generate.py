"""``rlhf-ray generate`` with real models: each prompt has its answers once, scored as the model scores them; what
it writes other jobs read; it goes on where it was interrupted, and tells what is wrong in a sentence before anything is loaded.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf_ray.cli.main import main
from rlhf_ray.config.loading import load_config
from rlhf_ray.data.load import load_demonstrations, load_pairs
from rlhf_ray.launch.sampling import generate as generating
from rlhf_ray.launch.sampling.answers import Answer, AnsweredPrompt, read_answers
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.source import Pending
from rlhf_ray.storage.growing import GrowingFile
from tests.launch.sampling.conftest import SMALL

pytestmark = pytest.mark.usefixtures("in_this_process", "project_log")


def generate(policy: Path, prompts: Path, output: Path, *more: str) -> int:
    words = ["generate", str(policy), "--prompts", str(prompts), "--output", str(output), "--in-process", *SMALL, *more]
    return main(words)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def answered(output: Path) -> list[AnsweredPrompt]:
    return read_answers(output.with_name(f"{output.stem}.answers.jsonl"))[1]


def plain_rewards(model: Path, prompts: list[AnsweredPrompt]) -> list[float | None]:
    """The rewards of all answers by plain transformers, one text at a time; none of one whose text has other ids than it."""
    scorer, tokenizer = AutoModelForSequenceClassification.from_pretrained(model), AutoTokenizer.from_pretrained(model)

    def score(one: AnsweredPrompt, answer: Answer) -> float | None:
        prompt, ids = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (one.prompt, answer.response))
        ids += [tokenizer.eos_token_id] * answer.finished
        if len(ids) != answer.tokens:  # special tokens, which a model with random weights samples too
            return None
        with torch.no_grad():
            return float(scorer(torch.tensor([prompt + ids])).logits)

    return [score(one, each) for one in prompts for each in one.answers]


def test_rewards_are_those_of_plain_transformers_and_the_rows_train_a_reward_model(
    policy: Path, reward_model: Path, prompts: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "pairs.jsonl"
    more = ("--samples", "4", "--reward", str(reward_model), "--select", "worst-best")
    assert generate(policy, prompts(12), output, *more) == 0
    kept = answered(output)
    assert sorted(one.prompt_id for one in kept) == [*range(12)]
    rewards = [each.reward for one in kept for each in one.answers]
    known = [pair for pair in zip(rewards, plain_rewards(reward_model, kept), strict=True) if pair[1] is not None]
    assert len(known) > 10
    assert [ours for ours, _ in known] == pytest.approx([plain for _, plain in known], abs=1e-4)
    assert len({each.response for one in kept for each in one.answers}) > 24, "answers differ"
    printed = capsys.readouterr().err
    assert f"{math.log(4) - 3 / 4:.3f}" in printed and "log n - (n - 1) / n nats" in printed
    config = load_config(
        "hh-rm", [f"data.path={output}", "data.evaluation_fraction=0"], kind="rm", files=True
    ).to_train()
    tokenizer = AutoTokenizer.from_pretrained(policy)
    pairs = load_pairs(config.data, tokenizer, 0).train
    rows = rows_of(output)
    assert len(pairs) == len(rows) == 12
    for pair, row in zip(pairs, rows, strict=True):
        for ids, side in ((pair.chosen, "chosen"), (pair.rejected, "rejected")):
            assert [*ids[:-1]] == [*tokenizer(row["prompt"])["input_ids"], *tokenizer(row[side])["input_ids"]]


@pytest.mark.parametrize("form", ["text", "conversation"])
def test_the_best_answers_train_a_policy(
    form: str, policy: Path, reward_model: Path, prompts: Callable[[int], Path], tmp_path: Path
) -> None:
    output, turns = tmp_path / "best.jsonl", f"data.apply_chat_template={str(form == 'conversation').lower()}"
    reward = str(reward_model) if form == "text" else FUNCTION
    assert generate(policy, prompts(6), output, "--samples", "3", "--reward", reward, "--select", "best", turns) == 0
    for row, one in zip(rows_of(output), sorted(answered(output), key=lambda each: each.prompt_id), strict=True):
        best = max(one.answers, key=lambda each: -math.inf if each.reward is None else each.reward)
        assert (row["prompt"], row["answer"], row["reward"]) == (one.prompt, best.response, best.reward)
        assert isinstance(row["prompt"], list) == (form == "conversation")
    config = load_config("gsm8k-sft", [f"data.path={output}", "data.evaluation_fraction=0", "data.evaluation_path=null",
                                       "data.prompt_key=prompt", "policy.model.make=null",
                                       f"policy.model.path={policy}"], kind="sft", files=True).to_train()  # fmt: skip
    learned = load_demonstrations(config.data, AutoTokenizer.from_pretrained(policy), 0).train
    assert len(learned) == 6


def test_an_interrupted_job_goes_on_and_a_finished_one_chooses_again_without_sampling(
    policy: Path,
    prompts: Callable[[int], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    project_log: io.StringIO,
) -> None:
    output, file = tmp_path / "rows.jsonl", prompts(10)
    more = ("--samples", "3", "--reward", FUNCTION, "rollout.max_num_seqs=3")
    extend, calls = GrowingFile.extend, list[int]()

    def stop_at_third(growing: GrowingFile, lines: list[str]) -> None:
        calls.append(len(lines))
        if len(calls) == 3:
            raise KeyboardInterrupt
        extend(growing, lines)

    with monkeypatch.context() as patched:
        patched.setattr(GrowingFile, "extend", stop_at_third)
        assert generate(policy, file, output, *more) == 75
    assert "the same command goes on after them" in project_log.getvalue() or not output.exists()
    before = answered(output)
    assert 0 < len(before) < 10
    assert generate(policy, file, output, *more) == 0
    after = answered(output)
    assert after[: len(before)] == before
    assert sorted(one.prompt_id for one in after) == [*range(10)]
    assert {len(one.answers) for one in after} == {3}

    def no_engine(*_: Any) -> Any:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(generating, "place_engines", no_engine)
    again = (*more, "--select", "best")
    assert generate(policy, file, output, *again) == 2, "the rows of before are not written over"
    assert generate(policy, file, output, "--overwrite", *again) == 0
    assert len(rows_of(output)) == 10


FUNCTION = "tests.launch.sampling.test_generate:shortness"


def shortness(responses: list[str], **_: Any) -> list[float]:
    """A reward function."""
    return [-float(len(response)) for response in responses]


class Failing:
    """A reward source that fails at some answers, or altogether."""

    reads = "nothing"

    def __init__(self, fault: str) -> None:
        self.fault = fault

    def score(self, samples: list[Any]) -> Pending[list[ScoreResult]]:
        bad = ScoreResult.failed("it has no idea", fault=self.fault)
        return Pending.done([bad if sample.sample_index == 1 else ScoreResult.of(1.0) for sample in samples])


@pytest.mark.parametrize("on_failure", ["drop", "stop"])
@pytest.mark.parametrize("fault", ["item", "source"])
def test_an_answer_without_a_reward_is_kept_with_its_reason_or_stops_the_job(
    fault: str,
    on_failure: str,
    policy: Path,
    prompts: Callable[[int], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    project_log: io.StringIO,
) -> None:
    """As in PPO, whoever is at fault: one that was kept would never be scored again."""
    output, source = tmp_path / "rows.jsonl", "tests.launch.sampling.test_generate:Failing"
    reward = f"reward={{source: '{source}', parameters: {{fault: {fault}}}, hold_s: 0, on_failure: {on_failure}}}"
    code = generate(policy, prompts(4), output, "--samples", "2", reward)
    if on_failure == "drop":
        assert code == 0 and len(rows_of(output)) == 4
        assert [each.error for one in answered(output) for each in one.answers] == [None, "it has no idea"] * 4
        assert generate(policy, prompts(4), output, "--samples", "2", reward, "--overwrite") == 0
        assert "4 have no reward, such as: it has no idea" in project_log.getvalue(), (
            "and it is said when they are read again"
        )
    else:
        said = capsys.readouterr().err
        assert code == 1 and "it has no idea" in said and "set reward.on_failure to drop" in said
        assert not output.exists() and answered(output) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--select", "best", "--samples", "4"), "best chooses by rewards, and none are asked for"),
        (("--reward", "world.gold", "--select", "best"), "1 leaves nothing to choose"),
        (("--reward", "nowhere/at-all/model"), "nowhere/at-all/model does not exist"),
        (("--reward", "tests.launch.sampling.test_generate:nothing"), "nothing"),
        (("--greedy", "--samples", "2"), "would be the same: set samples to 1"),
        (("data.max_prompt_tokens=15",), "prompts have more than 15 tokens"),
        (("rollout.mode=windowed",), "nothing is trained here, so it has no effect"),
        (("condition='<good> '", "--reward", "world.gold"), "must name {reward} or {decile}"),
        (("rollout.max_model_tokens=64",), "raise it to 1030"),
        (("--select", "worst"), "select"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_leaves_nothing(
    more: tuple[str, ...],
    message: str,
    policy: Path,
    prompts: Callable[[int], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = prompts(4)
    assert generate(policy, file, tmp_path / "rows.jsonl", *more) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert [*tmp_path.iterdir()] == [file]


def test_answers_of_another_job_are_not_gone_on_with(
    policy: Path, prompts: Callable[[int], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, file = tmp_path / "rows.jsonl", prompts(3)
    assert generate(policy, file, output) == 0
    output.unlink()
    assert generate(policy, file, output, "--samples", "2") == 2
    assert "holds the answers of another job (other samples)" in capsys.readouterr().err
    (tmp_path / "rows.answers.jsonl").write_text('{"prompt": "a"}\n')
    assert generate(policy, file, output) == 2, "whoever names a file is asked for another"
    assert "was not written by rlhf-ray generate" in capsys.readouterr().err


def test_a_deterministic_job_draws_the_same_answers_whatever_was_interrupted(
    policy: Path, prompts: Callable[[int], Path], tmp_path: Path
) -> None:
    file, more = prompts(5), ("--samples", "2", "run.deterministic=true")
    for name in ("one", "two"):
        assert generate(policy, file, tmp_path / f"{name}.jsonl", *more) == 0
    kept = tmp_path / "two.answers.jsonl"
    lines = kept.read_text().splitlines(keepends=True)
    kept.write_text("".join(lines[:3]) + lines[3][:20])
    (tmp_path / "two.answers.jsonl.unfinished").write_text(
        json.dumps({**json.loads(lines[0])["made_of"], "writer": "process 1"})
    )
    (tmp_path / "two.jsonl").unlink()
    assert generate(policy, file, tmp_path / "two.jsonl", *more) == 0
    assert rows_of(tmp_path / "two.jsonl") == rows_of(tmp_path / "one.jsonl")
