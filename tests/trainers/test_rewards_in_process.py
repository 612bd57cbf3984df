"""PPO against a mixture, end to end in one process: two reward models with other tokenizers, a function, several sources.

What must hold: the reward that is trained on is the weighted sum of its terms; ids reach only the model whose tokenizer is
the policy's; figures come for each source; all that is logged stands in the glossary.
"""

from __future__ import annotations

import json
from itertools import accumulate, pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.errors import RequestError, ScoringError
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.inputs import fingerprint_inputs
from rlhf_ray.trainers.ppo.answers import HeldOutAnswer
from rlhf_ray.trainers.ppo.build import train_ppo
from rlhf_ray.trainers.ppo.evaluation import PpoEvaluation
from rlhf_ray.world.language import NAMES
from tests.serving.reward_models import save_reward_model
from tests.trainers.glossary import unexplained

TINY_PPO = Path(__file__).parents[1] / "e2e" / "ppo_tiny.yaml"
ONE_PROCESS = ["policy.ranks=1", "policy.engine.zero=0", "rollout.backend=transformers", "rollout.engines=1",
               "monitoring.ray_metrics=false", "checkpoint.every_steps=0", "steps=2"]  # fmt: skip
FUNCTION = """
import math, pathlib

def short(responses, sources):
    return [-float(len(response)) if source != "bad" else None for response, source in zip(responses, sources)]

def particular(prompts, responses):
    # Cannot judge tents, and lamps no more once a file says so.
    no_lamps = pathlib.Path(__file__).with_name("no_lamps").exists()
    cannot = lambda prompt: "tent" in prompt or (no_lamps and "lamp" in prompt)
    return [math.nan if cannot(prompt) else float(len(response)) for prompt, response in zip(prompts, responses)]

def knows_no_radio(prompts, responses):
    return [None if "radio" in prompt else float(len(response) > 3) for prompt, response in zip(prompts, responses)]

def right(responses, labels):
    return [float(label == "1") for label in labels]
"""


@pytest.fixture(autouse=True)
def single_thread() -> None:
    torch.set_num_threads(1)


def rows(directory: Path, *sources: str) -> Path:
    path = directory / "rows.jsonl"
    items = ("kettle", "lamp", "radio", "tent", "clock", "chair")
    lines = [
        {"prompt": f"Hello. I am {name}. My {item} never came.\n", "label": str(number % 2),
         "source": sources[number % len(sources)]}
        for number, (name, item) in enumerate(product(NAMES[:8], items))
    ]  # fmt: skip
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "mine.py").write_text(FUNCTION)
    return path


def start(root: Path, path: Path, reward: str, *overrides: str) -> tuple[Any, RunDirectory]:
    settings = [f"run.root={root}", *ONE_PROCESS, f"data={{path: {path}, evaluation_fraction: 0.25, max_prompt_tokens: 48}}",
             "batch.prompts_per_step=12", "batch.sequences_per_update=12", "evaluation.prompts=12",
             f"reward={reward}"]  # fmt: skip
    config: Any = load_config(TINY_PPO, [*settings, *overrides], kind="ppo", files=True)
    return config, RunDirectory.create(root / "tiny", dump_config(config))


def tiny_model(tokenizer_from: str | Path) -> str:
    make = f"{{shape: llama-tiny, tokenizer_from: {tokenizer_from}, vocabulary: 300, seed: 3}}"
    return f"{{make: {make}, head_init: inv_sqrt, dtype: fp32}}"


def test_a_mixture_is_trained_on_evaluated_and_explained(tmp_path: Path) -> None:
    path = rows(tmp_path, "letters", "notes")
    terms = f"same: {{model: {tiny_model('world')}}}, other: {{model: {tiny_model(path)}, weight: 2.0}}"
    mine = f"short: {{function: '{tmp_path / 'mine.py'}:short', weight: -0.5}}"
    config, run = start(
        tmp_path, path, f"{{mixture: {{{terms}, {mine}}}}}", "evaluation.samples_per_prompt=2", "evaluation.pass_at=[1, 2]",
        f"evaluation.gold={tmp_path / 'mine.py'}:right",
    )  # fmt: skip
    train_ppo(config, run, None, place=ThisProcess(config.cluster))
    lines = run.metrics.read()
    for line in lines[:2]:
        parts = {name: line[f"reward_term/{name}"] for name in ("same", "other", "short")}
        assert len(set(parts.values())) == 3
        assert line["reward/learned"] == pytest.approx(
            parts["same"] + 2 * parts["other"] - 0.5 * parts["short"], abs=1e-5
        )
    figures = lines[-1]
    halves = [figures[f"evaluation/gold/{source}"] for source in ("letters", "notes")]
    assert halves == [0.0, 1.0] and 0.0 < figures["evaluation/gold"] < 1.0
    assert (
        figures["evaluation/pass_at_1"] == figures["evaluation/pass_at_2"] == pytest.approx(figures["evaluation/gold"])
    )
    reads = {check.name: check.value for check in run.summary().checks}["what the reward reads"]
    assert reads == "same: the ids as sampled; other: text, tokenized again; short: text and labels"
    assert unexplained(run) == set()
    assert run.ledger.verify(range(36)) == 0, "24 of the 36 that are not held out, each once"


def test_a_sample_without_a_reward_ends_the_run_or_drops_its_prompt(tmp_path: Path) -> None:
    path = rows(tmp_path, "good", "good", "bad")
    reward = f"{{function: '{tmp_path / 'mine.py'}:short', hold_s: 0.0, samples_per_call: 4}}"
    held_out_is_good = ["data.evaluation_fraction=null"]
    config, run = start(tmp_path / "stop", path, reward, *held_out_is_good)
    with pytest.raises(
        ScoringError, match=r"such as sample 0 of prompt \d+: reward function .*mine.py:short returned None"
    ):
        train_ppo(config, run, None, place=ThisProcess(config.cluster))


def test_an_evaluation_drops_a_prompt_that_has_no_reward_for_both_policies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, mine = rows(tmp_path, "one"), tmp_path / "mine.py"
    config, run = start(
        tmp_path, path, f"{{function: '{mine}:particular', on_failure: drop, max_dropped_share: 0.9}}",
        f"evaluation.gold={mine}:knows_no_radio", "evaluation.best_of=2", "evaluation.samples_per_prompt=2",
        "evaluation.prompts=100",
    )  # fmt: skip
    answered: list[list[HeldOutAnswer]] = []
    compare = PpoEvaluation.compare

    def keep(evaluation: PpoEvaluation) -> Any:
        mine.with_name("no_lamps").touch()
        answered.append(evaluation.start)
        comparison = compare(evaluation)
        answered.append(list(comparison.now))
        assert [row.prompt_id for row in comparison.start] == [row.prompt_id for row in comparison.now]
        return comparison

    monkeypatch.setattr(PpoEvaluation, "compare", keep)
    train_ppo(config, run, None, place=ThisProcess(config.cluster))
    lines = run.metrics.read()
    assert max(line["time/scoring"] for line in lines if "time/scoring" in line) < 20, (
        "NaN is not asked again for 100 s"
    )
    at_start, now = answered
    held_out = 12
    assert not any(word in row.prompt for row in at_start for word in ("tent", "radio"))
    assert any("lamp" in row.prompt for row in at_start)
    assert now and not any(word in row.prompt for row in now for word in ("tent", "radio", "lamp"))
    assert lines[-1]["evaluation/prompts_dropped"] == held_out - len({row.prompt_id for row in now})
    paired = [row.reward for row in at_start if "lamp" not in row.prompt]
    assert lines[-1]["evaluation/reward_start"] == pytest.approx(sum(paired) / len(paired))
    assert len(paired) == len(now) == 2 * len({row.prompt_id for row in now})


@pytest.mark.parametrize("tokens", ['["\\n"]', "[zebra]"])
def test_stop_tokens_end_answers_and_must_be_tokens(tmp_path: Path, tokens: str) -> None:
    path = rows(tmp_path, "letters")
    config, run = start(tmp_path, path, f"{{model: {tiny_model('world')}}}", f"rollout.stop_tokens={tokens}")
    if "zebra" in tokens:
        with pytest.raises(RequestError, match="'zebra' is not one token of the policy's tokenizer"):
            train_ppo(config, run, None, place=ThisProcess(config.cluster))
        return
    train_ppo(config, run, None, place=ThisProcess(config.cluster))
    answers = [
        json.loads(line) for step in sorted(run.samples.glob("*.jsonl")) for line in step.read_text().splitlines()
    ]
    assert all("\n" not in answer["response"].rstrip("\n") for answer in answers)


def test_an_ensemble_is_trained_on_by_its_reduction_and_shows_how_its_models_differ(tmp_path: Path) -> None:
    paths = [save_reward_model(tmp_path / f"model{seed}", seed=seed) for seed in range(3)]
    first, *others = [str(path) for path in paths]
    reward = json.dumps({"model": {"path": first, "dtype": "fp32"}, "ensemble": others, "k": 2.0})
    config, run = start(tmp_path, rows(tmp_path, "one"), reward, "rollout.max_model_tokens=200")
    assert list(config.reward.roles) == [f"reward.ensemble.{number}" for number in (1, 2, 3)]
    train_ppo(config, run, None, place=ThisProcess(config.cluster))
    for line in run.metrics.read()[:2]:
        means = [line[f"reward_term/model_{number}"] for number in (1, 2, 3)]
        spread = line["reward_term/spread"]
        assert len(set(means)) == 3 and spread > 0
        assert line["reward/learned"] == pytest.approx(sum(means) / 3 - 2.0 * spread, abs=1e-5)
    assert unexplained(run) == set()


def test_averaged_weights_score_as_one_model_and_every_member_is_an_input(tmp_path: Path) -> None:
    paths = [str(save_reward_model(tmp_path / f"model{seed}", seed=seed)) for seed in range(2)]
    first = {"path": paths[0], "dtype": "fp32"}
    reward = json.dumps({"model": first, "ensemble": paths[1:], "reduction": "weights"})
    config, run = start(tmp_path, rows(tmp_path, "one"), reward, "rollout.max_model_tokens=200")
    assert list(config.reward.roles) == ["reward"]
    assert {"reward.model.path", "reward.ensemble.2.model.path"} <= fingerprint_inputs(config).keys()
    train_ppo(config, run, None, place=ThisProcess(config.cluster))
    lines = run.metrics.read()
    assert (
        lines[0]["reward/learned"] != lines[1]["reward/learned"] and (run.averages / "reward" / "config.json").exists()
    )
    assert not any(name.startswith("reward_term") for name in lines[0]) and unexplained(run) == set()


@pytest.mark.parametrize("reduction", ["sum", "last"])
def test_rewards_of_steps_stand_at_their_tokens(tmp_path: Path, reduction: str) -> None:
    """The KL coefficient is 0, so that the token rewards are those of the steps alone."""
    path = rows(tmp_path, "one")
    with (tmp_path / "mine.py").open("a") as file:
        file.write("\ndef letters(responses):\n    return [[(end, float(end)) for end in range(1, len(text) + 1)] or [(0, 0.5)]"
                   " for text in responses]\n")  # fmt: skip
    reward = f"{{function: '{tmp_path / 'mine.py'}:letters', steps: {reduction}}}"
    config, run = start(tmp_path, path, reward, "monitoring.samples_per_log=12")
    train_ppo(config, run, None, place=ThisProcess(config.cluster))
    lines = run.metrics.read()
    samples = [json.loads(line) for line in sorted(run.samples.iterdir())[0].read_text().splitlines()]
    checked = exact = 0
    for sample in samples:
        length = len(sample["response"])
        wanted = sum(range(1, length + 1)) if reduction == "sum" else length
        wanted = wanted or 0.5
        given, texts = sample["tokens"]["token_rewards"], sample["tokens"]["text"]
        assert sum(given) == pytest.approx(wanted, abs=1e-3) and sample["score"] == pytest.approx(wanted)
        if "".join(texts) == sample["response"] and reduction == "sum":
            ends = list(accumulate(map(len, texts), initial=0))
            assert given == pytest.approx([sum(range(one + 1, two + 1)) for one, two in pairwise(ends)])
            exact += 1
        assert reduction == "sum" or [number for number in given if number] == pytest.approx([wanted])
        checked += length > 1
    assert (
        checked > 3
        and (exact > 3 or reduction == "last")
        and unexplained(run) == set()
        and lines[0]["reward/learned"] > 0
    )
