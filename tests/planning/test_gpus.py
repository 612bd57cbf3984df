"""The GPUs of a machine are counted by CUDA's driver, with or without NVIDIA's management tools."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray.config.sections.run import ClusterConfig
from rlhf_ray.planning import gpus
from rlhf_ray.planning.capacity import offered_here

Driver = Callable[[int], None]
SOURCE = """
int cuInit(unsigned int flags) {{ return {status}; }}
int cuDeviceGetCount(int *count) {{ *count = 3; return 0; }}
int cuDriverGetVersion(int *version) {{ *version = 12080; return 0; }}
"""


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Driver:
    """Take the place of CUDA's driver; its ``cuInit`` returns the status that the function is given."""
    if shutil.which("gcc") is None:
        pytest.skip("there is no compiler")

    def install(status: int) -> None:
        source, library = tmp_path / f"{status}.c", tmp_path / f"{status}.so"
        source.write_text(SOURCE.format(status=status))
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
        monkeypatch.setattr(gpus, "DRIVER", str(library))

    return install


def test_a_container_with_gpus_offers_them_without_nvidia_smi(driver: Driver) -> None:
    driver(0)
    assert gpus.count_gpus() == 3 and gpus.driver_version() == (12, 8)
    assert offered_here(ClusterConfig(num_cpus=2)) == {"CPU": 2.0, "GPU": 3.0}


def test_a_driver_without_a_gpu_offers_none(driver: Driver) -> None:
    """CUDA_ERROR_NO_DEVICE, also where CUDA_VISIBLE_DEVICES hides all of them."""
    driver(100)
    assert gpus.count_gpus() == 0 and gpus.driver_version() is None


def test_nvidia_smi_on_the_path_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(gpus, "DRIVER", str(tmp_path / "no-driver.so"))
    assert shutil.which("nvidia-smi") and offered_here(ClusterConfig(num_cpus=2)) == {"CPU": 2.0, "GPU": 0.0}
