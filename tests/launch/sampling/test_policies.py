"""``rlhf-ray evaluate POLICY --prompts``: the figures are those of the answers that are kept, counted by hand; policies are
compared at the prompts that count for both; what is wrong with a request is told in a sentence, before a model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml

import rlhf_ray
from rlhf_ray.cli.main import main
from rlhf_ray.config.sections.models import MakeConfig, ModelConfig
from rlhf_ray.errors import RequestError, ScoringError
from rlhf_ray.evaluation import mean_pass_at_k
from rlhf_ray.launch.sampling.answers import Answer, AnsweredPrompt, read_answers
from rlhf_ray.launch.sampling.policies import verdict
from rlhf_ray.launch.sampling.policy_figures import report_on
from rlhf_ray.models import load_tokenizer, make_model
from tests.launch.sampling.conftest import CHAT_TEMPLATE, SMALL

SETTINGS = [override for override in SMALL if not override.startswith("cut_answers")]


def answered(number: int, rewards: list[float | None], text: str = "answer", **more) -> AnsweredPrompt:
    answers = tuple(
        Answer(text, True, 3, -1.0, reward, None if reward is not None else "the judge refused") for reward in rewards
    )
    return AnsweredPrompt(number, f"prompt {number}", answers, **more)


# ------------------------------------------------------------------------------------------------------------------ figures


def test_figures_are_those_of_the_answers_counted_by_hand():
    first = [answered(0, [1.0, 0.0], "long answer"), answered(1, [1.0, 1.0], "long answer"), answered(2, [0.0, 0.0])]
    second = [answered(2, [0.0, 1.0]), answered(0, [0.0, 0.0]), answered(1, [1.0, 0.0])]
    report = report_on(["new", "old"], [first, second], pass_at=[1, 2])
    assert (report.prompts, report.left_out, report.samples) == (3, 0, 2)
    new, old = report.figures
    assert (new["reward"].value, old["reward"].value) == (0.5, pytest.approx(1 / 3))
    assert (new["pass_at_1"].value, new["pass_at_2"].value) == (0.5, pytest.approx(2 / 3))
    assert new["characters"].value == pytest.approx((11 + 11 + 6) / 3) and old["characters"].value == 6
    # wins of each prompt: 0 has 1, 0.5 from two ties and two wins; 1 two ties, two wins; 2 two ties, two losses
    assert report.comparison["win_rate"].value == pytest.approx((0.75 + 0.75 + 0.25) / 3)
    assert report.comparison["ties"].value == pytest.approx(0.5)
    assert report.comparison["wins"].value == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert report.comparison["reward_difference"].value == pytest.approx(0.5 - 1 / 3)
    assert report.comparison["pass_at_2_difference"].value == pytest.approx(2 / 3 - 2 / 3)
    for figures in (*report.figures, report.comparison):
        for figure in figures.values():
            assert figure.interval is None or figure.interval[0] <= figure.value <= figure.interval[1]


def test_a_prompt_without_all_rewards_of_both_is_left_out_for_both_and_counted():
    first = [answered(0, [1.0]), answered(1, [None]), answered(2, [1.0]), answered(3, [0.0])]
    second = [answered(0, [0.0]), answered(1, [1.0]), answered(2, [None])]
    report = report_on(["new", "old"], [first, second])
    assert (report.prompts, report.left_out) == (1, 3)
    assert report.figures[0]["reward"].value == 1.0
    assert "(3 prompts left out, which lack a reward)" in verdict(report)


def test_a_figure_of_one_policy_needs_no_other_and_sources_are_told_apart():
    prompts = [answered(number, [float(number < 6)], source="ab"[number % 2]) for number in range(8)]
    alone = report_on(["new"], [prompts], pass_at=[1])
    assert alone.comparison == {} and alone.figures[0]["pass_at_1"].value == 0.75
    assert "mean reward 0.750" in verdict(alone)
    other = [answered(number, [0.5], source="ab"[number % 2]) for number in range(8)]
    both = report_on(["new", "old"], [prompts, other])
    assert {source: figure.value for source, figure in both.sources.items()} == {"a": 0.75, "b": 0.75}


@pytest.mark.parametrize(
    ("better", "says"), [(range(40), "is better"), (range(0), "is worse"), (range(20), "is not shown to differ")]
)
def test_the_sentence_says_what_the_interval_shows(better, says):
    first = [answered(number, [float(number in better)]) for number in range(40)]
    report = report_on(["new", "old"], [first, [answered(number, [0.5]) for number in range(40)]])
    assert f"new {says}: it wins" in verdict(report)


@pytest.mark.parametrize(
    ("first", "second", "pass_at", "error", "problem"),
    [
        ([answered(0, [1.0])], [answered(0, [None])], [], ScoringError,
         "no prompt has rewards for all of its answers by new and old, such as: the judge refused"),
        ([answered(0, [1.0])], [answered(0, [1.0, 1.0])], [], RequestError,
         "different numbers of answers (1 of new and 2 of old at most)"),
        ([answered(0, [1.0])], [answered(0, [1.0])], [2], RequestError, "pass@2 of 1 answers to a prompt is undefined"),
        ([answered(0, [1.0])], [AnsweredPrompt(0, "another", (Answer("a", True, 1, 0.0, 1.0),))], [], RequestError,
         "prompt 0 is another one in the answers of old than in those of new"),
    ],
)  # fmt: skip
def test_answers_that_cannot_be_compared_are_refused(first, second, pass_at, error, problem):
    with pytest.raises(error) as caught:
        report_on(["new", "old"], [first, second], pass_at)
    assert problem in str(caught.value)


def test_rewards_that_say_neither_right_nor_wrong_are_counted_for_pass_at_k():
    prompts = [answered(0, [0.3, 2.0]), answered(1, [1.0, 0.0])]
    assert report_on(["new"], [prompts], [1]).neither == 2
    assert report_on(["new"], [prompts]).neither == 0


# ---------------------------------------------------------------------------------------------------------------- real models


@pytest.fixture(scope="module")
def other_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another policy with random weights and the same words."""
    tokenizer = load_tokenizer(ModelConfig(make=MakeConfig(shape="llama-tiny", tokenizer_from="world")))
    tokenizer.chat_template = CHAT_TEMPLATE
    directory = tmp_path_factory.mktemp("models") / "other"
    make_model("llama-tiny", len(tokenizer), seed=2, eos_token_id=tokenizer.eos_token_id).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def judge(tmp_path: Path) -> str:
    """A function that says right where the number of letters is even."""
    path = tmp_path / "judge.py"
    path.write_text("def right(responses):\n    return [float(len(text) % 2 == 0) for text in responses]\n")
    return f"{path}:right"


def evaluate(policy: Path, prompts: Path, output: Path, *more: str) -> int:
    words = [
        "evaluate",
        str(policy),
        "--prompts",
        str(prompts),
        "--output",
        str(output),
        "--in-process",
        *SETTINGS,
        *more,
    ]
    return main(words)


@pytest.mark.usefixtures("in_this_process")
def test_two_policies_are_sampled_and_compared_and_a_second_call_samples_nothing(
    policy: Path, other_policy: Path, prompts: Callable[[int], Path], judge: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output = tmp_path / "figures.json"
    words = ("--against", str(other_policy), "--reward", judge, "--samples", "3", "--pass-at", "1,3")
    assert evaluate(policy, prompts(9), output, *words) == 0
    found = json.loads(output.read_text())
    kept = [tmp_path / f"figures.{name}.answers.jsonl" for name in ("model", "against")]
    answers = [sorted(read_answers(path)[1], key=lambda one: one.prompt_id) for path in kept]
    rewards = [np.array([[answer.reward for answer in one.answers] for one in each]) for each in answers]
    assert [each.shape for each in rewards] == [(9, 3), (9, 3)]
    for each in answers:
        for one in each:
            assert [answer.reward for answer in one.answers] == [float(len(a.response) % 2 == 0) for a in one.answers]
    a, b = rewards
    meetings = np.sign(a[:, :, None] - b[:, None, :]) / 2 + 0.5
    assert found["comparison"]["figures"]["win_rate"] == pytest.approx(meetings.mean())
    assert found["policies"]["model"]["figures"]["pass_at_3"] == pytest.approx(mean_pass_at_k((a == 1.0).tolist(), 3))
    assert found["policies"]["against"]["figures"]["reward"] == pytest.approx(b.mean())
    assert found["policies"]["against"]["path"] == str(other_policy)
    assert any(one.answers[0].response != other.answers[0].response for one, other in zip(*answers, strict=True))
    said = capsys.readouterr().err
    assert "it wins" in said and str(output) in said.replace("\n", "")
    page = (tmp_path / "figures.html").read_text()
    assert answers[0][0].answers[0].response[:20] in page and answers[1][0].answers[0].response[:20] in page
    before = [path.stat().st_mtime_ns for path in kept]
    assert evaluate(policy, prompts(9), output, *words) == 2, "the figures stand there"
    assert evaluate(policy, prompts(9), output, *words, "--overwrite") == 0
    assert [path.stat().st_mtime_ns for path in kept] == before, "and the answers are not sampled again"
    assert json.loads(output.read_text()) == found


@pytest.mark.usefixtures("in_this_process")
def test_python_finds_what_the_command_finds(
    policy: Path, other_policy: Path, prompts: Callable[[int], Path], judge: str, tmp_path: Path
) -> None:
    file, (told, found) = prompts(4), (tmp_path / "told.json", tmp_path / "found.json")
    words = ("--against", str(other_policy), "--reward", judge, "--samples", "2", "--pass-at", "1,2")
    assert evaluate(policy, file, told, *words) == 0
    settings = [override.split("=", 1) for override in SETTINGS]
    keys = {name: yaml.safe_load(value) for name, value in settings}
    asked = {"reward": judge, "against": other_policy, "samples": 2, "in_process": True}
    report = rlhf_ray.evaluate_policies(policy, file, found, keys, pass_at=(2, 1), **asked)
    by_command, by_call = (json.loads(path.read_text()) for path in (told, found))
    assert by_call["comparison"] == by_command["comparison"]
    for name in ("model", "against"):
        assert by_call["policies"][name]["figures"] == by_command["policies"][name]["figures"]
    assert report.comparison["win_rate"].value == by_call["comparison"]["figures"]["win_rate"]
    with pytest.raises(RequestError, match="is the model itself"):
        rlhf_ray.evaluate_policies(policy, file, tmp_path / "x.json", keys, **(asked | {"against": policy}))
    with pytest.raises(RequestError, match="is a file that this command reads"):
        rlhf_ray.evaluate_policies(policy, file, file, keys, **asked)


@pytest.mark.usefixtures("in_this_process")
def test_a_reward_model_judges_one_policy_alone(
    policy: Path, reward_model: Path, prompts: Callable[[int], Path], tmp_path: Path
) -> None:
    output = tmp_path / "figures.json"
    assert evaluate(policy, prompts(5), output, "--reward", str(reward_model)) == 0
    found = json.loads(output.read_text())
    (kept,) = [read_answers(tmp_path / "figures.model.answers.jsonl")[1]]
    rewards = [one.answers[0].reward for one in kept]
    assert found["comparison"] is None and list(found["policies"]) == ["model"]
    assert found["policies"]["model"]["figures"]["reward"] == pytest.approx(np.mean(rewards))


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["MODEL"], "name either --data, pairs that a reward model is compared with, or --prompts, which a policy answers"),
        (["MODEL", "--data", "PROMPTS", "--prompts", "PROMPTS"], "name either --data"),
        (["MODEL", "--data", "PROMPTS", "--against", "MODEL"], "--against has no effect without --prompts: remove it"),
        (["MODEL", "--prompts", "PROMPTS", "--data-only"], "--data-only has no effect without --data: remove it"),
        (["--prompts", "PROMPTS", "--output", "OUT"], "evaluate --prompts needs a policy"),
        (["MODEL", "--prompts", "PROMPTS"], "evaluate --prompts needs --output FIGURES.json"),
        (["MODEL", "--prompts", "PROMPTS", "--output", "OUT"], "answers are compared by their rewards: give --reward"),
        (["MODEL", "--prompts", "PROMPTS", "--output", "OUT", "--reward", "JUDGE", "--pass-at", "two"],
         "--pass-at two: write whole numbers with commas between them"),
        (["MODEL", "--prompts", "PROMPTS", "--output", "OUT", "--reward", "JUDGE", "--pass-at", "4", "--samples", "2"],
         "--pass-at 4 is undefined for 2 answers to a prompt: raise --samples, or lower it"),
        (["MODEL", "--prompts", "PROMPTS", "--output", "OUT", "--reward", "JUDGE", "--pass-at", "0"],
         "--pass-at 0 is undefined: write whole numbers from 1 on"),
        (["MODEL", "--against", "MODEL", "--prompts", "PROMPTS", "--output", "OUT", "--reward", "JUDGE"],
         "which is the model itself: name another policy"),
        (["MODEL", "--against", "AGAIN", "--prompts", "PROMPTS", "--output", "OUT", "--reward", "JUDGE"],
         "which is the model itself: name another policy"),
        (["MODEL", "--prompts", "PROMPTS", "--output", "PAGE", "--reward", "JUDGE"], "where the page goes: name a .json file"),
        (["MODEL", "--prompts", "PROMPTS", "--output", "OUT", "--reward", "JUDGE", "--chosen-key", "best"],
         "--chosen-key has no effect without --data: remove it"),
        (["MODEL", "--data", "PROMPTS", "--config", "generate"], "--config has no effect without --prompts: remove it"),
        (["MODEL", "select=best", "samples=2", "--prompts", "PROMPTS", "--output", "OUT", "--reward", "JUDGE"],
         "select is about rows to train on, and evaluate writes none: remove it"),
        (["MODEL", "--against", "nowhere", "--prompts", "PROMPTS", "--output", "OUT", "--reward", "JUDGE"], "nowhere"),
        (["MODEL", "--prompts", "PROMPTS", "--output", "PROMPTS", "--reward", "JUDGE"], "is a file that this command reads"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("in_this_process")
def test_a_wrong_request_is_told_in_a_sentence(
    words: list[str], problem: str, policy: Path, prompts: Callable[[int], Path], judge: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "link").symlink_to(policy)
    names = {"AGAIN": str(tmp_path / "link") + "/", "PAGE": str(tmp_path / "figures.html")}
    names |= {"MODEL": str(policy), "PROMPTS": str(prompts(2)), "OUT": str(tmp_path / "out.json"), "JUDGE": judge}
    more = ["--in-process", *SETTINGS] if "--output" in words else []
    assert main(["evaluate", *(names.get(word, word) for word in words), *more]) == 2
    said = capsys.readouterr().err
    assert problem in said.replace("\n", " "), said
    assert "Traceback" not in said
