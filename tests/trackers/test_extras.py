"""What the extras of trackers need fits the versions that are pinned, so that one environment holds all of it."""

from __future__ import annotations

import os
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.locks.gpu import pins
from tests.trackers.wanted import wanted

PINS = {"cpu": pins("cpu.txt", "dev.txt"), "gpu": pins("gpu.txt")}
LIMITS = {"pillow": "<13", "cachetools": "<8"}
"""By trackio 0.43 and mlflow-skinny 3.17: the newest versions of these two are too new for them."""


@pytest.mark.parametrize("lock", PINS)
@pytest.mark.parametrize("name", LIMITS)
def test_what_is_pinned_lower_for_trackers_stays_so(lock: str, name: str) -> None:
    assert Requirement(f"{name}{LIMITS[name]}").specifier.contains(PINS[lock][name])


def needed() -> list[tuple[str, Requirement]]:
    """Every requirement of the extras and of what they bring, with who has it."""
    found, seen, queue = [], set[str](), [("the extras", Requirement(text)) for text in wanted()]
    while queue:
        owner, wants = queue.pop()
        if wants.marker is not None and not wants.marker.evaluate({"extra": ""}):
            continue
        found.append((owner, wants))
        name = canonicalize_name(wants.name)
        if name not in seen:
            seen.add(name)
            queue += [(wants.name, Requirement(line)) for line in requires(wants.name) or []]
    return found


@pytest.mark.parametrize("lock", PINS)
def test_the_extras_resolve_with_the_pins(lock: str) -> None:
    try:
        everything = needed()
    except PackageNotFoundError as missing:
        assert not os.environ.get("TRACKERS_MUST_BE_THERE"), missing
        pytest.skip(f"{missing.name} is not installed: make trackers")
    assert len(everything) > 40
    wrong = [
        f"{owner} wants {wants}, and {name} {pin} is pinned"
        for owner, wants in everything
        if (pin := PINS[lock].get(name := canonicalize_name(wants.name))) is not None
        and not wants.specifier.contains(Version(pin), prereleases=True)
    ]
    assert wrong == []


def test_the_makefile_installs_what_the_extras_want() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text()
    assert "tests.trackers.wanted" in makefile and "TRACKERS_MUST_BE_THERE=1" in makefile
    assert {Requirement(text).name for text in wanted()} == {
        "tensorboard", "wandb", "mlflow-skinny", "sqlalchemy", "alembic", "trackio",
    }  # fmt: skip
