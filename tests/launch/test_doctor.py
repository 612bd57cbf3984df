"""The doctor finds what is missing or wrong, says what mends it, and tells what jobs need from what they can do without."""

from __future__ import annotations

from importlib import metadata

import pytest
import torch
from packaging.requirements import Requirement

from rlhf_ray.cli.main import main
from rlhf_ray.launch import doctor
from rlhf_ray.launch.doctor import Finding, examine, exit_code, report
from rlhf_ray.models.forward.attention_backends import KERNELS
from rlhf_ray.models.weights.quantization import bitsandbytes

Lines = dict[tuple[str, str], Finding]


def lines() -> Lines:
    return {(finding.section, finding.name): finding for finding in examine()}


def pretend(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Other versions of some packages; an empty one is not installed."""
    true = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: versions.get(name.replace("-", "_"), true(name)))


def test_this_machine_is_described(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    output = capsys.readouterr().out
    for part in ("torch", torch.__version__, "sdpa", "works", "nf4", "liger", "RAM", "GiB available", "ready: "):
        assert part in output
    assert "needed, and not right" not in output


def test_every_package_that_is_asked_for_is_looked_at() -> None:
    required = {Requirement(text).name for text in metadata.requires("rlhf-ray") or [] if "extra" not in text}
    assert len(required) > 10 and required <= {name for section, name in lines() if section == "versions"}


@pytest.mark.parametrize(
    ("versions", "name", "state", "fix", "needed"),
    [
        ({"transformers": "5.20.1"}, "transformers", "5.20.1, but", "pip install 'transformers", True),
        ({"ray": ""}, "ray", "not installed", "pip install 'ray", True),
        ({"torchvision": "0.28.0"}, "torchvision", "breaks", "pip uninstall -y torchvision", True),
        ({"rlhf_ray": ""}, "rlhf-ray", "not installed", "pip install --no-deps -e .", True),
    ],
)
def test_packages_that_are_wrong(
    monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], name: str, state: str, fix: str, needed: bool
) -> None:
    pretend(monkeypatch, **versions)
    finding = lines()["versions", name]
    assert state in finding.state and finding.fix.startswith(fix) and finding.needed == needed
    output = report(examine())
    assert "needed, and not right:" in output and finding.fix in output and "ready:" not in output
    assert exit_code(examine()) == 1


def test_what_jobs_can_do_without_costs_no_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, bitsandbytes="")
    assert lines()["quantisation", "nf4"].fix == "pip install bitsandbytes"
    assert "not here, and not needed for everything:" in report(examine()) and exit_code(examine()) == 0


def test_without_torch_the_rest_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert ("memory", "RAM") in lines() and not any(section == "attention" for section, _ in lines())


def test_a_driver_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's driver shows one, and torch is a CPU build."""
    monkeypatch.setattr(doctor, "count_gpus", lambda: 1)
    finding = lines()["accelerators", "GPU"]
    assert "torch sees none" in finding.state and "requirements/gpu.txt" in finding.fix and finding.needed


def test_a_kernel_works_only_if_it_has_just_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed is not enough: one that another version of torch calls otherwise fails when it is called."""

    def other_version(*_: object, **__: object) -> torch.Tensor:
        raise TypeError("varlen_attn() got an unexpected keyword argument\nand more")

    def no_gradient(query: torch.Tensor, *_: object, **__: object) -> torch.Tensor:
        return query * float("nan")

    for kernel, said in ((other_version, "TypeError: varlen_attn() got an"), (no_gradient, "not finite")):
        monkeypatch.setitem(KERNELS, "sdpa", kernel)
        state = lines()["attention", "sdpa"].state
        assert state.startswith("fails when it runs") and said in state and "more" not in state


def test_weights_in_4_bits_work_only_if_they_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    package = bitsandbytes()
    assert package is not None
    monkeypatch.setattr(package.functional, "dequantize_4bit", lambda *_: torch.zeros(64, 64))
    assert lines()["quantisation", "nf4"].state == "fails when it runs: ValueError: the numbers do not come back"


@pytest.mark.parametrize(("runs", "older"), [((12, 8), True), ((13, 0), False), ((13, 2), False), ((14, 0), False)])
def test_a_driver_older_than_what_torch_was_built_for(runs: tuple[int, int], older: bool) -> None:
    """Within a major version the older driver runs what was built for the newer."""
    finding = doctor._driver("13.1", runs)
    assert finding.needed and bool(finding.fix) == older and f"CUDA {runs[0]}.{runs[1]}" in finding.state


@pytest.mark.parametrize("gpus", [0, 1])
def test_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch, gpus: int) -> None:
    """On a GPU kernels are compiled when they first run."""
    monkeypatch.setattr(doctor, "count_gpus", lambda: gpus)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: None)
    finding = next(iter(doctor._tools()))
    assert finding.fix.startswith("install one, such as gcc") and finding.needed == bool(gpus)


def test_the_recipes_are_those_of_the_machine() -> None:
    cpu, gpu = doctor._first_steps("cpu"), doctor._first_steps("cuda")
    assert "hh-rm" in cpu and "70b" not in cpu and "llama-3-70b-4nodes" in gpu and "demo-ppo" not in gpu
