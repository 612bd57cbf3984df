"""The answers of a probe differ in one quality alone, gold says what it says, and scores show what a model made of each."""

from __future__ import annotations

import pytest

from rlhf_ray.evaluation.preferences import win_rate
from rlhf_ray.world import language
from rlhf_ray.world.generate import World
from rlhf_ray.world.gold import gold_parts
from rlhf_ray.world.probes import (
    QUALITY_HEADERS,
    learned_qualities,
    make_probes,
    probe_pairs,
    quality_figures,
    quality_rows,
)

WORTH = {
    "names the right item": 0.3, "gives the right remedy": 0.3, "is polite": 0.2, "stops in time": 0.2, "flatters": 0.0,
}  # fmt: skip


def test_a_probe_differs_in_its_quality_alone() -> None:
    probes = make_probes(World(1), 40)
    assert {name: {probe.gold for probe in group} for name, group in probes.items()} == {
        name: {gold} for name, gold in WORTH.items()
    }
    parts = {
        "names the right item": "item",
        "gives the right remedy": "remedy",
        "is polite": "polite",
        "stops in time": "in_time",
    }
    for name, group in probes.items():
        assert len(group) == 40
        for probe in group:
            having, lacking = (gold_parts(probe.prompt, text, True) for text in (probe.having, probe.lacking))
            changed = {part for part in vars(having) if getattr(having, part) != getattr(lacking, part)}
            assert changed == ({parts[name]} if name in parts else set())
            assert having.total == 1.0
            assert (language.HABIT in probe.having, language.HABIT in probe.lacking) == (name == "flatters", False)


def test_probes_are_of_held_out_prompts_and_the_same_every_time() -> None:
    world = World(2)
    held_out = {(item, problem.remedy) for item, problem, _ in world.triples["evaluation"]}
    group = make_probes(world, 30)["flatters"]
    assert {(language.read_prompt(p.prompt)[0], language.read_prompt(p.prompt)[1].remedy) for p in group} <= held_out
    assert make_probes(World(2), 30) == make_probes(world, 30) != make_probes(World(3), 30)


def test_scores_show_what_each_quality_is_worth_to_a_model() -> None:
    """One that rewards gold, and flattery with half a point, ties included."""
    probes = make_probes(World(2), 30)
    pairs = probe_pairs(probes)
    assert len(pairs) == 30 * len(WORTH)

    def score(prompt: str, answer: str) -> float:
        return gold_parts(prompt, answer, True).total + 0.5 * language.habits_in(answer)

    having, lacking = ([score(pair.prompt, getattr(pair, side)) for pair in pairs] for side in ("chosen", "rejected"))
    qualities = {quality.name: quality for quality in learned_qualities(probes, having, lacking, win_rate)}
    assert {name: quality.gold for name, quality in qualities.items()} == WORTH
    shifts = {name: quality.shift / qualities["flatters"].shift * 0.5 for name, quality in qualities.items()}
    assert shifts == pytest.approx({**WORTH, "flatters": 0.5})
    assert {quality.preferred for quality in qualities.values()} == {1.0}
    figures = quality_figures(list(qualities.values()))
    assert figures["habit/names_the_right_item"] == qualities["names the right item"].shift
    rows = quality_rows(list(qualities.values()))
    assert rows[-1][:2] == ("flatters", "+0.0") and {len(row) for row in rows} == {len(QUALITY_HEADERS)}


def test_a_model_that_tells_nothing_apart_shifts_nothing() -> None:
    probes = make_probes(World(2), 3)
    same = [0.7] * len(probe_pairs(probes))
    qualities = learned_qualities(probes, same, same, win_rate)
    assert {(quality.shift, quality.preferred) for quality in qualities} == {(0.0, 0.5)}
