"""What a process keeps of the memory that it frees."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest


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
    kept, given_back = faults_of_later_passes(keeping=True), faults_of_later_passes(keeping=False)
    assert kept < 0.25 * given_back, (kept, given_back)
