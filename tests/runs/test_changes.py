"""What of its config a run may change: every key of every job has one rule, and what may not change is refused by its name."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.jobs.registry import job_class, trained_kinds
from rlhf_ray.config.keys import entries_of, join, section_of
from rlhf_ray.config.loading import load_config
from rlhf_ray.config.sections.base import Section
from rlhf_ray.runs.changes import NAME, RULES, compare, refusals, section_in_table


def is_always_there(section: type[Section], name: str) -> bool:
    """Whether a key is a section that is never null, whose own keys have the rules."""
    annotation = section.model_fields[name].annotation
    return isinstance(annotation, type) and issubclass(annotation, Section)


def classified(section: type[Section], pattern: str = "", table: str = "") -> Iterator[tuple[str, bool]]:
    for name, info in section.model_fields.items():
        key, below = join(pattern, name), join(table, name)
        inner, entry = section_of(info.annotation), entries_of(info.annotation)
        if not is_always_there(section, name):
            yield key, name in RULES.get(table, {})
        if inner is not None:
            yield from classified(inner, key, section_in_table(inner, below))
        if entry is not None:
            named = join(key, NAME)
            yield from classified(entry, named, section_in_table(entry, named))


@pytest.mark.parametrize("kind", trained_kinds())
def test_every_key_of_every_job_says_whether_it_may_change(kind):
    rules = dict(classified(job_class(kind)))
    assert len(rules) > 100
    assert [key for key, known in rules.items() if not known] == []


def test_the_table_names_no_key_that_no_job_has():
    used: set[tuple[str, str]] = set()

    def walk(section: type[Section], table: str) -> None:
        for name, info in section.model_fields.items():
            used.add((table, name))
            inner, entry = section_of(info.annotation), entries_of(info.annotation)
            below = join(table, name)
            if inner is not None:
                walk(inner, section_in_table(inner, below))
            if entry is not None:
                walk(entry, section_in_table(entry, join(below.replace("SCORING", "reward"), NAME)))

    for kind in trained_kinds():
        walk(job_class(kind), "")
    assert [(table, name) for table, rules in RULES.items() for name in rules if (table, name) not in used] == []


def job(*overrides: str, kind: str = "ppo") -> Any:
    return load_config(f"demo-{kind}", ["run.name=a", *overrides], kind=kind).to_train()


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("ppo", "run.seed=1", "run.seed=2"),
        ("ppo", "policy.model.dtype=fp32", "policy.model.dtype=bf16"),
        ("ppo", "policy.engine.zero=2", "policy.engine.zero=3"),
        ("ppo", "critic.engine.optimizer.weight_decay=0.0", "critic.engine.optimizer.weight_decay=0.1"),
        ("ppo", "algorithm.kl.coefficient=0.1", "algorithm.kl.coefficient=0.2"),
        ("ppo", "data.max_prompt_tokens=48", "data.max_prompt_tokens=40"),
        ("sft", "policy.model.make.shape=llama-tiny", "policy.model.make.shape=llama-0.5m"),
        ("rm", "reward.model.lora=null", "reward.model.lora={rank: 4, alpha: 16, dropout: 0.0, targets: all-linear}"),
        ("rm", "loss.label_smoothing=0.0", "loss.label_smoothing=0.1"),
        ("rm", "run.root=runs", "run.root=other"),
    ],
)
def test_what_may_not_change_is_refused_with_key_both_values_and_the_way_out(kind, before, after):
    changes = compare(job(before, kind=kind), job(after, kind=kind))
    key, _, old = before.partition("=")
    sentences = refusals(changes)
    assert len(sentences) == 1
    sentence = sentences[0]
    assert sentence.startswith(f"{key}: it is {old} in this run and cannot become {after.partition('=')[2]}: ")
    assert any(way in sentence for way in ("start a new run", "resume with the value of the run", "move the directory"))


@pytest.mark.parametrize(
    ("kind", "change", "rule"),
    [
        ("ppo", "steps=999", "said"),
        ("sft", "epochs=9.5", "said"),
        ("rm", "reward.engine.optimizer.learning_rate=1e-7", "said"),
        ("ppo", "batch.passes_per_step=7", "said"),
        ("ppo", "rollout.temperature=0.5", "said"),
        ("ppo", "policy.ranks=3", "said"),
        ("ppo", "critic.ranks=2", "said"),
        ("ppo", "reward={model: null, function: gsm8k}", "said"),
        ("ppo", "checkpoint.every_steps=77", "free"),
        ("ppo", "evaluation.every_steps=77", "free"),
        ("ppo", "reward.hold_s=7", "free"),
        ("ppo", "reward.ranks=3", "free"),
        ("ppo", "expose={port: 0}", "free"),
        ("rm", "reward.model.path=elsewhere", "content"),
    ],
)
def test_what_may_change_is_named_with_both_values(kind, change, rule):
    old = job(kind=kind)
    changes = [one for one in compare(old, job(change, kind=kind)) if one.key == change.partition("=")[0]] or compare(
        old, job(change, kind=kind)
    )
    assert refusals(changes) == []
    assert rule in {one.rule.kind for one in changes}
    for one in changes:
        assert one.before != one.after and str(one).startswith(f"{one.key}: ") and " -> " in str(one)
        assert one.rule.text or one.rule.kind != "said"


def test_nothing_changes_between_equal_configs_and_a_term_that_comes_is_a_change_of_the_mixture():
    assert compare(job(), job()) == []
    terms = "a: {function: gsm8k, weight: 0.5}"
    one = job("reward={model: null, mixture: {" + terms + "}}", "data.world=null", f"data.path={Path(__file__)}")
    two = job(
        "reward={model: null, mixture: {" + terms + ", b: {function: exact_match}}}",
        "data.world=null",
        f"data.path={Path(__file__)}",
    )
    (change,) = compare(one, two)
    assert change.key == "reward.mixture.b" and change.before is None and change.rule.kind == "said"
    (weight,) = compare(
        one, job("reward={model: null, mixture: {a: {function: gsm8k, weight: 0.25}}}", "data.world=null",
                 f"data.path={Path(__file__)}")
    )  # fmt: skip
    assert (weight.key, weight.before, weight.after, weight.rule.kind) == ("reward.mixture.a.weight", 0.5, 0.25, "said")


@pytest.mark.parametrize("kind", ["ppo", "sft"])
def test_held_out_rows_that_come_or_go_are_no_other_place_of_the_same(kind):
    """PPO compares with answers to them that the start gave, and the rows to train on are those without them."""
    limit = "max_prompt_tokens" if kind == "ppo" else "max_tokens"
    without, given, moved = (
        job(f"data={{path: a.jsonl, {limit}: 48{more}}}", kind=kind)
        for more in ("", ", evaluation_path: b.jsonl", ", evaluation_path: c.jsonl")
    )
    assert refusals(compare(given, moved)) == []
    for before, after in ((without, given), (given, without)):
        refused = refusals(compare(before, after))
        assert len(refused) == 1 and refused[0].startswith("data.evaluation_path: it is "), refused
        assert "start a new run" in refused[0]
