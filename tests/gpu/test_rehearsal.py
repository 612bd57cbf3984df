"""``make gpu`` on a machine that holds only what a bare GPU machine holds, but for the GPU and the versions."""

from __future__ import annotations

import importlib.metadata
import json
import math
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.gpu import bare_machine, carried, prepare, rehearse
from tests.gpu.checks import CHECKS

pytestmark = pytest.mark.early
ROOT = Path(__file__).parents[2]
NOT_INSTALLED_HERE = {"liger-kernel"}
"""Carried, but of no use without a GPU, so that this project's own environment has it not."""


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment like the bare machine's."""
    return bare_machine.link_environment(tmp_path_factory.mktemp("machine"))


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is carried to it, as ``tests.gpu.prepare`` leaves it, in the versions of this environment."""
    folder = tmp_path_factory.mktemp("wheels")
    for name in sorted(set(carried.PACKAGES) - NOT_INSTALLED_HERE):
        bare_machine.pack_wheel(name, folder)
    carried.write_hashes(folder)
    return folder


def test_every_check_that_needs_no_cuda_kernel_passes_on_a_bare_machine(
    machine: Path, wheels: Path, tmp_path: Path
) -> None:
    look = "import importlib.util as u; print([n for n in ('pydantic', 'deepspeed', 'ray', 'vllm') if u.find_spec(n)])"
    assert subprocess.check_output([machine, "-c", look], text=True).strip() == "[]", "this machine is not bare"
    results = tmp_path / "gpu.json"
    command = [machine, "-m", "tests.gpu.run", "--device", "cpu", "--wheels", wheels, "--results", results]
    command += rehearse.UNHURRIED
    done = subprocess.run(command, capture_output=True, text=True, timeout=540, cwd=ROOT)
    expected = {check.name: "left out" if "cuda kernel" in check.needs else "passed" for check in CHECKS}
    endings = re.findall(r"^(passed|failed|left out) +(\w+):", done.stdout, re.MULTILINE)
    ended = {name: ending for ending, name in endings}
    assert ended == expected, done.stdout[-8000:] + done.stderr[-2000:]
    assert done.returncode == 0
    figures = json.loads(results.read_text())["figures"]
    assert len(figures) > len(CHECKS) // 2
    assert all(math.isfinite(figure["value"]) and figure["value"] > 0 for figure in figures.values())


def test_a_wheel_that_is_not_as_it_was_prepared_is_not_installed(tmp_path: Path) -> None:
    folder = tmp_path / "wheels"
    folder.mkdir()
    wheel = bare_machine.pack_wheel("typing-inspection", folder)
    carried.write_hashes(folder)
    wheel.write_bytes(wheel.read_bytes() + b"!")
    with pytest.raises(SystemExit, match=r"is not as it was prepared: .* python -m tests\.gpu\.prepare"):
        carried.install(folder, tmp_path / "site")
    wheel.unlink()
    with pytest.raises(SystemExit, match="is missing"):
        carried.install(folder, tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_wheels_for_another_python_are_refused_with_the_command_that_makes_the_right_ones(tmp_path: Path) -> None:
    wheel = bare_machine.pack_wheel("typing-inspection", tmp_path)
    wheel.rename(tmp_path / wheel.name.replace("py3-none-any", "cp39-cp39-manylinux1_x86_64"))
    carried.write_hashes(tmp_path)
    with pytest.raises(SystemExit, match=r"cannot be installed(.|\n)*tests\.gpu\.prepare --python 3\."):
        carried.install(tmp_path, tmp_path / "site")


def test_what_is_carried_has_the_versions_that_are_tested_and_all_that_it_needs() -> None:
    pins = prepare.pins()
    there = set(carried.PACKAGES) | {"torch", "numpy", "packaging", "tqdm", "triton"}
    for name in set(carried.PACKAGES) - NOT_INSTALLED_HERE:
        held = importlib.metadata.distribution(name)
        assert held.version == pins[name]
        needs = [Requirement(line) for line in held.requires or []]
        names = {canonicalize_name(n.name) for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})}
        assert names <= there, f"{name} needs {names - there}"
    assert set(carried.PACKAGES) <= set(pins)
    assert set(bare_machine.ABSENT).isdisjoint(bare_machine.PACKAGES)
