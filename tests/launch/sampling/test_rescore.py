"""``rlhf-ray rescore``: its figures are those of the definitions, its samples those that were kept; a run is not changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rlhf_ray
from rlhf_ray.cli.main import main
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.launch.sampling.rescore import Rescored, _reasons, compare, read_samples
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.ppo.metrics import _beside
from tests.launch.sampling.conftest import SMALL

pytestmark = pytest.mark.usefixtures("in_this_process", "project_log")
FUNCTION = "tests.launch.sampling.test_rescore:length"
TALK = ({"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hi"})


def length(responses: list[str], labels: list[Any], **_: Any) -> list[float]:
    """A reward function that reads labels too."""
    return [
        len(response) + (10.0 if label == "yes" else 0.0) for response, label in zip(responses, labels, strict=True)
    ]


def sample(response: str, prompt_id: int = 0, **more: Any) -> TextSample:
    return TextSample(prompt_id, 0, "Say.", response, None, True, (), **more)


def test_figures_are_those_of_pairs_within_prompts() -> None:
    rescored = [
        Rescored("a", sample("x"), 1.0, 5.0),
        Rescored("a", sample("y"), 2.0, 4.0),
        Rescored("a", sample("z"), 3.0, 6.0),
        Rescored("b", sample("v"), 1.0, 1.0),
        Rescored("b", sample("w"), 1.0, 2.0),
        Rescored("b", sample("u"), 1.0, None, "it failed"),
    ]
    report = compare(rescored)
    assert report.figures["samples"] == 6 and report.figures["without_reward"] == 1
    assert report.figures["pairs"] == 3 and report.figures["flipped"] == pytest.approx(1 / 3)
    assert report.figures["mean_before"] == pytest.approx(8 / 5) and report.figures["mean_now"] == pytest.approx(18 / 5)
    assert report.figures["rank_correlation_within"] == pytest.approx(0.5)
    assert [(one.group, one.ordered, one.flipped) for one in report.changed] == [("a", 3, 1)]


def run_with_samples(root: Path, rows: dict[int, list[dict[str, Any]]]) -> RunDirectory:
    config = load_config(Path(__file__).parents[2] / "e2e/ppo_tiny.yaml", [f"run.root={root}"])
    run = RunDirectory.create(root / "tiny", dump_config(config))
    for step, samples in rows.items():
        run.write_samples(step, samples)
    run.release()
    return run


def test_the_samples_of_a_run_come_with_all_that_a_reward_reads(tmp_path: Path) -> None:
    kept = sample("Hi", 3, messages=TALK, tools=({"name": "f"},), template_variables={"think": True}, source="s")
    row = {"prompt": "Say.", **_beside(kept), "response": "Hi", "finished": True, "score": 0.5}
    run = run_with_samples(tmp_path, {1: [row], 4: [row, {"prompt": "Old.", "response": "No", "score": 1.0}]})
    samples = read_samples(run.path)
    assert [one.before for one in samples] == [0.5, 0.5, 1.0]
    assert [one.group for one in samples] == ["step 1, row 3", "step 4, row 3", "step 4, Old."]
    one = samples[0].sample
    assert (one.messages, one.tools, one.template_variables, one.source) == (
        TALK,
        ({"name": "f"},),
        {"think": True},
        "s",
    )


def test_a_run_is_rescored_from_the_command_line_and_not_changed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "P", "prompt_id": 1, "response": "long answer", "score": 0.0, "label": "no"},
        {"prompt": "P", "prompt_id": 1, "response": "short", "score": 1.0, "label": "no"},
        {"prompt": "P", "prompt_id": 1, "response": "", "score": 2.0, "label": "yes"},
    ]
    run = run_with_samples(tmp_path, {2: rows})
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    output = tmp_path / "rescored.jsonl"
    assert main(["rescore", str(run.path), "--reward", FUNCTION, "--output", str(output)]) == 0
    printed = capsys.readouterr().err
    assert "step 2, row 1" in printed and "3 of 3" not in printed and "2 of 3" in printed
    assert [json.loads(line)["now"] for line in output.read_text().splitlines()] == [11.0, 5.0, 10.0]
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before
    assert main(["rescore", str(run.path), "--reward", FUNCTION, "--output", str(output)]) == 2
    report = rlhf_ray.rescore(run.path, FUNCTION)
    assert report.figures["flipped"] == pytest.approx(2 / 3)


def test_answers_of_generate_are_rescored(policy: Path, prompts: Callable[[int], Path], tmp_path: Path) -> None:
    output = tmp_path / "rows.jsonl"
    words = ["--prompts", str(prompts(4)), "--output", str(output), "--samples", "3", "--in-process", *SMALL]
    assert main(["generate", str(policy), *words, "--reward", FUNCTION]) == 0
    report = rlhf_ray.rescore(tmp_path / "rows.answers.jsonl", FUNCTION)
    assert report.figures["samples"] == 12 and report.figures["flipped"] == 0.0
    assert report.figures["rank_correlation"] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        ("nowhere/at-all/model", "does not exist"),
        ("tests.launch.sampling.test_rescore:nothing", "nothing"),
        ("http://127.0.0.1:9", "127.0.0.1:9"),
    ],
)
def test_a_reward_that_is_not_there_is_one_sentence(
    reward: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with_samples(tmp_path, {1: [{"prompt": "P", "prompt_id": 1, "response": "a", "score": 0.0}]})
    assert main(["rescore", str(run.path), "--reward", reward]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert main(["rescore", str(tmp_path / "none"), "--reward", FUNCTION]) == 2


def nothing_finite(responses: list[str], **_: Any) -> list[float]:
    """A reward function none of whose rewards is a number."""
    return [float("nan") for _ in responses]


def test_a_reward_that_scores_nothing_is_a_failure_with_its_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_with_samples(tmp_path, {1: [{"prompt": "P", "prompt_id": 1, "response": "a", "score": 0.0}]})
    assert main(["rescore", str(run.path), "--reward", "tests.launch.sampling.test_rescore:nothing_finite"]) == 1
    said = capsys.readouterr().err.replace("\n", " ")
    assert "of 1 samples none has both rewards (1 because" in said and "not a finite number" in said
    assert "Traceback" not in said


def test_samples_without_a_reward_are_reported_with_their_reasons() -> None:
    samples = [
        *(Rescored("g", sample("a"), 1.0, None, "it is too long") for _ in range(3)),
        Rescored("g", sample("b"), None, 2.0),
        Rescored("g", sample("c"), 1.0, 2.0),
    ]
    assert _reasons(samples) == "3 because it is too long; 1 because it had none before"
    assert compare(samples).figures["without_reward"] == 4.0


@pytest.mark.parametrize("key", ["on_failure=drop", "max_dropped_share=0.5"])
def test_a_key_of_training_steps_is_refused(key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = run_with_samples(tmp_path, {1: [{"prompt": "P", "prompt_id": 1, "response": "a", "score": 0.0}]})
    assert main(["rescore", str(run.path), f"reward.{key}", "--reward", FUNCTION]) == 2
    assert (
        f"reward.{key.partition('=')[0]}: it is about the prompts of a training step: remove it"
        in capsys.readouterr().err
    )
