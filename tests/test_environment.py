"""What a process keeps of the memory that it frees, and the variables that processes start with."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

from rlhf_ray.environment import ALLOCATOR, RAY_WHEN_ASKED, for_process


def faults_of_later_passes(*, keeping: bool) -> int:
    """Pages that passes ask the system for once they are warm: each frees 40 MB in each of two threads."""
    program = f"""
import resource, torch
from torch import nn
from rlhf_ray.environment import keep_freed_memory
from rlhf_ray.models.forward.parallel_packs import ParallelPacks
if {keeping}:
    keep_freed_memory()
streams, faults = ParallelPacks(2), []
for _ in range(100):
    streams.map(nn.Identity(), lambda *_: sum([torch.ones(1_000_000) for _ in range(10)]), [None] * 2)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[39])
"""
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library allocates here")
def test_what_a_pass_frees_stays_with_the_process() -> None:
    """Else thousands of its pages go back to the system and are asked for again."""
    kept = faults_of_later_passes(keeping=True)
    given_back = max(faults_of_later_passes(keeping=False) for _ in range(3))  # which heap a thread gets is chance
    assert kept < 0.25 * given_back, (kept, given_back)


def test_a_process_uses_the_device_that_it_was_placed_on_and_one_that_starts_others_hides_no_gpu_from_them() -> None:
    cpu, gpu, driver = for_process(device="cpu"), for_process(device="cuda"), for_process()
    assert (cpu["DS_ACCELERATOR"], gpu["DS_ACCELERATOR"], driver["DS_ACCELERATOR"]) == ("cpu", "cuda", "cpu")
    assert cpu["CUDA_VISIBLE_DEVICES"] == "" and "CUDA_VISIBLE_DEVICES" not in gpu | driver
    assert gpu.get(ALLOCATOR) == "expandable_segments:True" and ALLOCATOR not in cpu | driver


def test_memory_that_others_open_lies_in_segments_that_they_can_open() -> None:
    assert ALLOCATOR not in for_process(device="cuda", hands_memory_on=True)


def test_what_the_user_asks_of_the_allocator_goes_on_to_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ALLOCATOR, "expandable_segments:False")
    assert for_process(device="cuda").get(ALLOCATOR) == "expandable_segments:False"


def test_our_commands_start_ray_when_asked_and_not_by_a_call_that_comes_after_the_connection() -> None:
    program = """
import argparse
from rlhf_ray.cli.main import _run

def late(options):
    import ray
    try:
        ray.put(1)
    except ray.exceptions.RaySystemError as error:
        print("refused:", error)
    assert not ray.is_initialized()
    return 0

raise SystemExit(_run(argparse.Namespace(run=late)))
"""
    free = {name: value for name, value in os.environ.items() if name not in RAY_WHEN_ASKED}
    ended = subprocess.run([sys.executable, "-c", program], env=free, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0 and ended.stdout.startswith("refused:"), ended.stdout + ended.stderr
