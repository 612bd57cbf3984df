"""The GPU set is pinned whole, as the CPU set is, and has its versions wherever it can; ``make locks`` asks pip the rest."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.locks.gpu import APART, ELSEWHERE, LOCK, ONLY_CPU, ROOT, pins, wanted

GPU = pins("gpu.txt")


def test_every_line_of_the_lock_pins_one_version() -> None:
    lines = [line for line in LOCK.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == len(GPU) > 200
    assert all(re.fullmatch(r"[a-z0-9.-]+==[A-Za-z0-9.+!]+", line) for line in lines), lines


def test_both_sets_have_one_version_of_each_package_but_for_those_with_a_reason() -> None:
    cpu = pins("cpu.txt", "torch-cpu.txt")
    assert {name for name in cpu.keys() & GPU.keys() if cpu[name] != GPU[name]} == APART.keys()
    assert cpu.keys() - GPU.keys() == ONLY_CPU.keys()
    assert cpu["torch"] == f"{GPU['torch']}+cpu"
    tools = pins("dev.txt")
    assert all(tools[name] == GPU[name] for name in tools.keys() & GPU.keys())


@pytest.mark.parametrize("line", wanted())
def test_the_lock_holds_what_the_package_asks_for(line: str) -> None:
    requirement = Requirement(line)
    if requirement.marker is None or requirement.marker.evaluate():
        pinned = GPU.get(canonicalize_name(requirement.name))
        assert pinned is not None and requirement.specifier.contains(pinned)


def test_what_has_a_file_of_its_own_is_not_in_the_lock() -> None:
    assert not GPU.keys() & set(ELSEWHERE)
    assert set(ELSEWHERE) == pins("build.txt", "deepspeed.txt").keys()


@pytest.mark.parametrize("place", ["Dockerfile", "README.md", "requirements/gpu.txt"])
def test_the_lock_is_installed_as_it_stands(place: str) -> None:
    """A resolver would look for other versions beside it."""
    text = re.sub(r"\\\n\s*", " ", Path(ROOT / place).read_text())
    commands = [part for part in re.split(r"\n|&&", text) if "pip install" in part and "gpu.txt" in part]
    assert commands and all("--no-deps" in command for command in commands)
