"""A partial config hides nothing: a rule ends at an absent value and at nothing else."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from copy import deepcopy
from functools import reduce
from typing import Any

import pytest

from rlhf_ray.config.jobs.registry import job_class
from rlhf_ray.config.loading import dump_config, parse_config
from rlhf_ray.config.problems import attempt
from rlhf_ray.config.reading import read_mapping
from rlhf_ray.config.sections.base import Absent, Section
from rlhf_ray.config.validation import parse
from rlhf_ray.errors import ConfigError


class Pet(Section):
    name: str
    legs: int = 4


class Shop(Section):
    pet: Pet
    town: str = "here"

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.pet.legs > 4:
            yield "pet.legs", f"{self.pet.nmae} has too many"  # type: ignore[attr-defined]  # the typo of the test


def test_an_absent_value_is_told_from_a_name_that_nobody_declared():
    shop = parse(Shop, {"pet": {"name": "rex", "legs": "four"}}).config
    with pytest.raises(Absent, match=r"Pet\.legs"):
        _ = shop.pet.legs
    with pytest.raises(AttributeError, match="nmae"):
        _ = shop.pet.nmae
    assert not hasattr(shop, "street")


def test_a_typo_in_a_rule_raises_although_the_config_has_another_problem():
    with pytest.raises(AttributeError, match="nmae"):
        parse(Shop, {"pet": {"name": "rex", "legs": 6}, "town": 5})


def test_a_rule_that_reads_an_absent_value_keeps_what_it_found_before():
    shop = parse(Shop, {"pet": {"name": "rex", "legs": "four"}}).config

    def rule() -> Iterator[tuple[str, str]]:
        yield "town", "far away"
        yield "pet.legs", str(shop.pet.legs)

    assert attempt([rule], partial=True) == [("town", "far away")]
    with pytest.raises(Absent):
        attempt([rule], partial=False)


def paths(values: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every key of a written config, sections included."""
    for name, value in values.items():
        yield (*before, name)
        if isinstance(value, dict):
            yield from paths(value, (*before, name))


def section_at(values: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    return reduce(operator.getitem, path, values)


@pytest.mark.parametrize("how", ["removed", "wrong", "null"])
def test_every_rule_of_every_job_ends_in_problems_or_at_an_absent_value(texts, kind, how):
    written = read_mapping(dump_config(parse_config(texts[kind]))).values
    for path in paths(written):
        if path == ("kind",):
            continue
        values = deepcopy(written)
        *outer, name = path
        if how == "removed":
            del section_at(values, tuple(outer))[name]
        else:
            section_at(values, tuple(outer))[name] = [["wrong"]] if how == "wrong" else None
        parsed = parse(job_class(kind), values)
        rules = [*parsed.config.rules(), *parsed.config.files()]
        problems = attempt(rules, partial=not parsed.complete)
        assert how != "wrong" or parsed.problems, f"{path} may not be a list of lists"
        assert all(isinstance(key, str) and isinstance(text, str) for key, text in problems)


def test_a_conflict_in_the_policy_is_its_own_problem_beside_a_wrong_value():
    text = "kind: ppo\nrun: {name: x}\ndata: {world: {}}\nreward: {function: verifiers.numeric}\n"
    problems = _problems(
        text, ["policy.model={make: {shape: llama-tiny, tokenizer_from: world}, revision: main}", "steps=no"]
    )
    assert any(problem.startswith("policy.model.revision: a made model has no revision") for problem in problems)
    assert any(problem.startswith("steps: 'no' is not a whole number above 0") for problem in problems)


def test_a_wrong_part_of_an_algorithm_hides_no_mistake_in_another():
    text = "kind: ppo\nalgorithm: {objective: 1, advantages: gea, collector: mine, dynamic_sampling: 3}\n"
    problems = _problems(text, [])
    assert any(
        problem.startswith("algorithm.objective: 1 is not clip, cispo, dppo_tv, dppo_kl, or one of your own")
        for problem in problems
    )
    assert any(problem.startswith("algorithm.advantages: 'gea' is not one of") for problem in problems)
    assert any(problem.startswith("algorithm.collector: 'mine' is not one of") for problem in problems)
    assert any(problem.startswith("algorithm.dynamic_sampling: 3 has no effect") for problem in problems)


def _problems(text: str, overrides: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as raised:
        parse_config(text, overrides)
    return list(raised.value.problems)
