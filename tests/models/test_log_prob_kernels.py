"""The Triton kernels of the log-prob head compute what plain torch does, in Triton's interpreter, and compile for a GPU.

They have not run on a GPU yet.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_ray.models.forward import log_probs

triton = pytest.importorskip("triton")
PROGRAM = Path(__file__).parent / "kernel_program.py"


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """What the kernels gave in Triton's interpreter."""
    paths = os.pathsep.join([str(PROGRAM.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run([sys.executable, PROGRAM], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    numbers: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return numbers


def test_a_head_on_the_kernels_is_the_formula(measured: dict[str, Any]) -> None:
    """With bias, softcap, temperature and the entropy's gradient, and without each."""
    assert len(measured["heads"]) == 16 and max(measured["heads"].values()) < 2e-6, measured["heads"]


def test_sums_hold_where_the_highest_logit_moves_from_block_to_block(measured: dict[str, Any]) -> None:
    assert len(measured["moving"]) == 3 and max(measured["moving"]) < 2e-6, measured["moving"]


def test_a_gradient_is_written_over_the_logits_or_in_half_precision_beside_them(measured: dict[str, Any]) -> None:
    assert measured["gradients"]["in_place"]
    assert measured["gradients"]["half"] == "torch.bfloat16" and measured["gradients"]["half_off"] < 2**-7


def test_they_pass_the_trial_before_their_use(measured: dict[str, Any]) -> None:
    assert measured["works"]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [(lambda *_: 1 / 0, "ZeroDivisionError"), (lambda *_: log_probs.from_logits(*_[:2], 0.6, *_[3:]), "they differ")],
)
def test_what_fails_its_trial_is_told_once_and_not_used(
    monkeypatch: pytest.MonkeyPatch, project_log: StringIO, wrong: Any, reason: str
) -> None:
    from rlhf_ray.models.forward import log_prob_kernels as kernels

    monkeypatch.setattr(kernels, "from_logits", wrong)
    monkeypatch.setattr(kernels, "logits_gradient", log_probs.logits_gradient)
    cpu = torch.device("cpu")
    log_probs.kernels_work.cache_clear()
    assert not log_probs.kernels_work(kernels, cpu) and not log_probs.kernels_work(kernels, cpu)
    (line,) = project_log.getvalue().splitlines()
    assert "without Triton's kernels on cpu" in line and reason in line
    log_probs.kernels_work.cache_clear()


def test_a_gpu_takes_them_where_they_work_and_a_cpu_never(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_ray.models.forward import log_prob_kernels

    assert log_probs._functions(torch.device("cpu")) is log_probs
    for works in (True, False):
        monkeypatch.setattr(log_probs, "kernels_work", lambda kernels, device, works=works: works)
        assert log_probs._functions(torch.device("cuda")) is (log_prob_kernels if works else log_probs)


def test_they_compile_for_an_h100(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To machine code, with the compiler that Triton brings: the interpreter accepts what the compiler does not."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from rlhf_ray.models.forward import log_prob_kernels as kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kinds = {"targets": "*i64", "vocabulary": "i32", "temperature": "fp32", "softcap": "fp32", "gradient": "*bf16"}
    for kernel in (kernels._forward_kernel, kernels._backward_kernel):
        constants = {name: True for name in kernel.arg_names if name.isupper()} | {"BLOCK": kernels.BLOCK}
        names = (name for name in kernel.arg_names if name not in constants)
        signature = {name: kinds.get(name, "*fp32") for name in names} | dict.fromkeys(constants, "constexpr")
        source, target = ASTSource(kernel, signature, constants), GPUTarget("cuda", 90, 32)
        assert triton.compile(source, target=target, options={"num_warps": kernels.WARPS}).asm["cubin"]
