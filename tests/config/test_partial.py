"""A partial config hides nothing: a rule ends at an absent value and at nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from rlhf_ray.config.loading import dump_config, parse_config
from rlhf_ray.config.problems import attempt
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


def keys(values: Any, before: str = "") -> Iterator[str]:
    """Every key of a written config that has a value, sections included."""
    for name, value in values.items():
        yield f"{before}{name}"
        if isinstance(value, dict):
            yield from keys(value, f"{before}{name}.")


@pytest.mark.parametrize("wrong", ["[[wrong]]", "null"])
def test_every_rule_ends_in_problems_whichever_value_is_wrong_or_missing(texts, kind, wrong):
    resolved = dump_config(parse_config(texts[kind]))
    for key in keys(yaml.safe_load(resolved)):
        try:
            parse_config(resolved, [f"{key}={wrong}"], files=True)
        except ConfigError as error:
            assert error.problems
        else:
            assert wrong == "null", f"{key} may not be a list of lists"
