"""Whole runs of ``train dpo`` in this process: the reference, its cache, resuming, adapters, and what KTO measures."""

from __future__ import annotations

import gc
import json
from itertools import count
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.config.loading import load_config
from rlhf_ray.errors import DataError, GroupError, ResumableStop
from rlhf_ray.launch.driver import continue_run
from rlhf_ray.models import load_tokenizer
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.supervised import preferences, reference
from rlhf_ray.trainers.supervised.loop import SupervisedTrainer
from tests.trainers.glossary import unexplained
from tests.trainers.small_runs import ask_to_stop, config_of, signals_as_before, train

KTO = ["loss={name: kto, beta: 0.5}", "batch={answers_per_update: 8}"]


def lines_of(run: RunDirectory) -> list[dict[str, float]]:
    return [line for line in run.metrics.read() if "update" in line]


@pytest.mark.parametrize(
    ("settings", "first"),
    [([], 0.6931), (["loss={name: ipo, beta: 0.5}"], 1.0), (KTO, 0.5), (["policy.model.lora={rank: 2}"], 0.6931)],
    ids=["dpo", "ipo", "kto", "lora"],
)
def test_the_first_loss_is_that_of_the_reference_itself_and_falls(
    tmp_path: Path, settings: list[str], first: float
) -> None:
    run = train(config_of("dpo", tmp_path, *settings, "epochs=6", "policy.engine.optimizer.learning_rate=1e-2"))
    name = "loss/kto" if settings == KTO else "loss/dpo"
    losses = [line[name] for line in lines_of(run)]
    assert losses[0] == pytest.approx(first, abs=1e-4)
    assert min(losses[-2:]) < first - 0.03
    assert unexplained(run) == set()
    assert (run.final / "config.json").exists()


def test_the_reference_is_asked_once_and_kept_for_other_losses_and_adapters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    measure = reference.measure
    monkeypatch.setattr(reference, "measure", lambda *args, **named: calls.append(1) or measure(*args, **named))
    cache = f"data.cache={tmp_path}/cache"
    first = lines_of(train(config_of("dpo", tmp_path, cache)))
    assert len(calls) == 2, "one call for the pairs to train on, one for those held out"
    again = lines_of(train(config_of("dpo", tmp_path, cache, "run.name=again")))
    assert len(calls) == 2
    assert [line["loss/dpo"] for line in again] == [line["loss/dpo"] for line in first]
    train(config_of("dpo", tmp_path, cache, "run.name=ipo", "loss={name: ipo}", "policy.model.lora={rank: 2}"))
    assert len(calls) == 2
    train(config_of("dpo", tmp_path, cache, "run.name=simpo", "loss={name: simpo}"))
    assert len(calls) == 2, "SimPO has no reference"
    train(config_of("dpo", tmp_path, cache, "run.name=seed", "policy.model.make.seed=1"))
    assert len(calls) == 4, "another model"
    train(config_of("dpo", tmp_path, cache, "run.name=rows", "data.world.pairs=7"))
    assert len(calls) == 5, "other pairs to train on, the same held out"


def test_the_reference_holds_one_batch_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: WeakSet[Any] = WeakSet()
    most = []
    make = preferences.make_policy_pair_batch

    def making(rows: Any) -> Any:
        gc.collect()
        most.append(len(alive))
        batch = make(rows)
        alive.add(batch)
        return batch

    monkeypatch.setattr(preferences, "make_policy_pair_batch", making)
    monkeypatch.setattr(reference, "EXAMPLES_PER_CALL", 2)
    train(config_of("dpo", tmp_path, "data.cache=null"))
    first = most[:12]  # of 8 pairs and 4 held-out ones, each two at a time: once for the key and once for the policy
    assert len(most) > len(first) and max(first) <= 1, most


@pytest.mark.parametrize("settings", [[], KTO], ids=["dpo", "kto"])
def test_a_resumed_run_ends_as_one_that_was_never_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: list[str]
) -> None:
    """The reference is that of the first weights, although the run goes on from a checkpoint and keeps no cache."""
    long = [*settings, "epochs=3", "checkpoint.every_steps=1", "policy.engine.optimizer.learning_rate=1e-2"]
    whole = train(config_of("dpo", tmp_path / "whole", *long))
    advance = SupervisedTrainer.advance

    def stop_after_two(trainer: SupervisedTrainer) -> None:
        advance(trainer)
        if trainer.progress.update == 2:
            ask_to_stop()

    (tmp_path / "stopped").mkdir()
    config = config_of("dpo", tmp_path / "stopped", *long)
    with signals_as_before(), monkeypatch.context() as patched, pytest.raises(ResumableStop):
        patched.setattr(SupervisedTrainer, "advance", stop_after_two)
        train(config)
    path = Path(config.run.root) / config.run.name
    continue_run(str(path), place=ThisProcess(config.cluster))
    key = "loss/kto" if settings else "loss/dpo"
    expected, found = (
        {line["update"]: line[key] for line in lines_of(run)} for run in (whole, RunDirectory.open(path))
    )
    assert found == expected and len(expected) >= 3


def test_the_baseline_is_measured_before_each_update_over_answers_to_other_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    make = preferences.make_other_answers_batch
    monkeypatch.setattr(preferences, "make_other_answers_batch", lambda rows: seen.append(rows) or make(rows))
    run = train(config_of("dpo", tmp_path, *KTO, "epochs=4", "policy.engine.optimizer.learning_rate=3e-2"))
    points = [line["kl/baseline"] for line in lines_of(run)]
    assert len(seen) == len(points) and points[0] == pytest.approx(0.0, abs=1e-4)
    assert max(points) > 0.01, "the weights have moved since"
    for rows in seen:
        assert len(rows) == 8
        for row in rows:
            assert row.reference is not None and list(row.other_answer) != []


def test_a_rank_that_fails_before_an_update_costs_no_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [*KTO, "epochs=2", "checkpoint.every_steps=0"]
    expected = lines_of(train(config_of("dpo", tmp_path, *settings, "run.name=whole")))
    calls, real = count(1), preferences.JudgedAnswers.loss_now

    def failing(self: preferences.JudgedAnswers, examples: Any) -> Any:
        if next(calls) == 3:
            raise GroupError("policy", 0, "log_probs", "CUDA out of memory")
        return real(self, examples)

    monkeypatch.setattr(preferences.JudgedAnswers, "loss_now", failing)
    lines = lines_of(train(config_of("dpo", tmp_path, *settings, "run.name=failed")))
    assert next(calls) > 3
    assert [line["loss/kto"] for line in lines] == pytest.approx([line["loss/kto"] for line in expected], rel=1e-6)


def test_held_out_figures_are_of_the_policy_and_the_report_shows_its_pairs(tmp_path: Path) -> None:
    run = train(config_of("dpo", tmp_path, "evaluation.every_steps=1"))
    figures = [line for line in run.metrics.read() if "evaluation/loss" in line]
    assert [line["step"] for line in figures] == [1, 2]
    assert all(0.0 <= line["evaluation/accuracy"] <= 1.0 for line in figures)
    assert "chosen answer" in run.report_path.read_text()


def rows_config(tmp_path: Path, rows: list[dict[str, Any]], *settings: str) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = f"policy.model={{make: {{shape: llama-tiny, tokenizer_from: {path}, vocabulary: 300}}, dtype: fp32}}"
    return config_of(
        "dpo", tmp_path, *KTO, model, f"data={{path: {path}, evaluation_fraction: 0, cache: null}}", *settings
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": f"{n}?", "completion": "yes", "label": True} for n in range(4)],
         "all 4 answers to train on have the label true, and KTO learns from both kinds: add answers with the label false"),
        ([{"prompt": "one?", "answer": f"yes {n}", "label": n % 2} for n in range(4)],
         "all 4 answers have the same prompt, and KTO compares with answers to other prompts: add rows with other prompts"),
    ],
)  # fmt: skip
def test_answers_that_kto_cannot_learn_from_are_one_sentence(
    tmp_path: Path, rows: list[dict[str, Any]], message: str
) -> None:
    config = rows_config(tmp_path, rows)
    with pytest.raises(DataError, match=message):
        preferences.JudgedAnswers(config, load_tokenizer(config.policy.model))


def test_rows_of_a_file_are_learned_and_labels_out_of_balance_are_told(tmp_path: Path, project_log: Any) -> None:
    rows = [{"prompt": f"{n}?", "completion": f" answer {n}", "label": n % 4 != 0} for n in range(16)]
    run = train(rows_config(tmp_path, rows))
    assert lines_of(run)[-1]["update"] == 2
    assert (
        "12 of 16 answers are desirable: together they weigh 3.00 times as much as the others" in project_log.getvalue()
    )
    assert "set loss.desirable_weight to 0.333" in project_log.getvalue()


def test_packs_do_not_change_the_loss(tmp_path: Path) -> None:
    """One pack for all sequences, and packs of one pair each."""
    torch.set_num_threads(1)
    runs = [
        train(config_of("dpo", tmp_path, f"run.name=n{tokens}", f"batch.max_tokens_per_micro_batch={tokens}"))
        for tokens in (192, 4096)
    ]
    first, second = ([line["loss/dpo"] for line in lines_of(run)] for run in runs)
    assert first == pytest.approx(second, abs=1e-5)


def test_the_recipe_checks(tmp_path: Path) -> None:
    config = load_config("demo-dpo", [f"run.root={tmp_path}"], kind="dpo")
    assert config.to_train().kind == "dpo"
