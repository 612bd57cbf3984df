"""Never more processors than the process is bound to, or than its control group grants."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from rlhf_ray.config.sections.run import ClusterConfig
from rlhf_ray.planning import processors as module
from rlhf_ray.planning.capacity import offered_here
from rlhf_ray.planning.processors import processors


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty tree of control groups, on a machine of 64 processors."""
    monkeypatch.setattr(module, "CGROUPS", tmp_path)
    monkeypatch.setattr(module, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(64)))
    return tmp_path


def write(root: Path, files: Mapping[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 64),
        ({"cpu.max": "max 100000"}, 64),
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "250000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"own": "0::/a/b\n", "a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000"}, 3),
        ({"own": "0::/a/b\n", "a/cpu.max": "300000 100000", "a/b/cpu.max": "150000 50000\n"}, 3),
        ({"own": "0::/../elsewhere\n", "cpu.max": "400000 100000"}, 4),
        ({"own": "4:cpu:/x\n0::/gone\n"}, 64),
        ({"cpu/cpu.cfs_quota_us": "500000", "cpu/cpu.cfs_period_us": "100000"}, 5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ({"cpu.max": ""}, 64),
    ],
)
def test_a_control_group_limits_them(cgroups: Path, files: Mapping[str, str], expected: int) -> None:
    write(cgroups, files)
    assert processors() == expected
    assert offered_here(ClusterConfig()) == {"CPU": expected, "GPU": 0.0}


def test_so_does_what_the_process_is_bound_to(cgroups: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 7})
    write(cgroups, {"cpu.max": "400000 100000"})
    assert processors() == 2
    assert offered_here(ClusterConfig(num_cpus=9)) == {"CPU": 9.0, "GPU": 0.0}, "what the config says counts"
