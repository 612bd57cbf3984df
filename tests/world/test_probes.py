"""The answers of a probe differ in one quality alone, and gold says what it says."""

from __future__ import annotations

from rlhf_ray.world import language
from rlhf_ray.world.generate import World, gold_parts
from rlhf_ray.world.probes import probes

WORTH = {
    "names the right item": 0.3, "gives the right remedy": 0.3, "is polite": 0.2, "stops in time": 0.2, "flatters": 0.0,
}  # fmt: skip


def test_a_probe_differs_in_its_quality_alone() -> None:
    found = probes(World(1), 40)
    assert {name: {probe.gold for probe in group} for name, group in found.items()} == {
        name: {gold} for name, gold in WORTH.items()
    }
    parts = {
        "names the right item": "item",
        "gives the right remedy": "remedy",
        "is polite": "polite",
        "stops in time": "in_time",
    }
    for name, group in found.items():
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
    group = probes(world, 30)["flatters"]
    assert {(language.read_prompt(p.prompt)[0], language.read_prompt(p.prompt)[1].remedy) for p in group} <= held_out
    assert probes(World(2), 30) == probes(world, 30) != probes(World(3), 30)
