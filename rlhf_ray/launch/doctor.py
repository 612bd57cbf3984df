"""``rlhf-ray doctor``: report what this machine can run, and what would let it run more.

Invariants: nothing is installed, started or downloaded; a problem comes with the command that fixes it, if there is one; what
is required is listed apart from what is merely absent.
"""

from __future__ import annotations

import platform
import shutil
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from rlhf_ray.config.recipes import recipes
from rlhf_ray.console import table
from rlhf_ray.environment import Device
from rlhf_ray.errors import EXIT_DONE, EXIT_FAILED
from rlhf_ray.planning.gpus import count_gpus

PACKAGE, GIB = "rlhf-ray", 2**30
SHARED_MEMORY = Path("/dev/shm")
LEAST_SHARED_GIB = 1.0
"""Ray's object store lies in shared memory; with less it falls back to the disk, and says so in its own logs only."""


@dataclass(frozen=True)
class Finding:
    """One thing about this machine."""

    section: str
    name: str
    state: str
    fix: str = ""
    """What to type or to do; empty if nothing is wrong."""
    needed: bool = False
    """Without it, jobs do not run here."""


def examine() -> list[Finding]:
    """Examine everything, in the order in which it is shown."""
    findings = [*_python(), *_packages(), *_strangers()]
    if all(find_spec(package) is not None for package in ("torch", "transformers", "jaxtyping")):
        findings += [*_accelerators(), *_attention(), *_kernels()]
    return [*findings, *_memory()]


def report(findings: Iterable[Finding]) -> str:
    """Return a table, and below it what is missing and how to get it."""
    findings = list(findings)
    rows = [(f.section, f.name, f.state) for f in findings]
    lines = [table("this machine", ("what", "", "state"), rows)]
    for title, wanted in (("needed, and not right:", True), ("not here, and not needed for everything:", False)):
        fixes = [f"  {f.name}: {f.state}\n    {f.fix}" for f in findings if f.fix and f.needed == wanted]
        lines += [f"\n{title}", *fixes] if fixes else []
    if not any(finding.fix and finding.needed for finding in findings):
        lines.append(f"\nready: {_first_steps(_device())}")
    return "\n".join(lines)


def exit_code(findings: Iterable[Finding]) -> int:
    """0 where jobs can run."""
    return EXIT_FAILED if any(finding.fix and finding.needed for finding in findings) else EXIT_DONE


def _device() -> Device:
    """What jobs on this machine are best placed on."""
    return "cuda" if count_gpus() > 0 else "cpu"


def _first_steps(device: Device) -> str:
    names = [name for name, path in recipes().items() if ("gpus_per_rank" in path.read_text()) == (device == "cuda")]
    start = "make demo runs everything here on CPU; " if device == "cpu" else ""
    return f"{start}recipes for this machine: {', '.join(names)}"


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    right = (3, 11) <= sys.version_info[:2] < (3, 14)
    fix = "" if right else "install Python 3.11, 3.12 or 3.13, and make the environment with it"
    yield Finding("versions", "Python", version, fix, needed=True)


def _packages() -> Iterator[Finding]:
    """Compare the packages that this one requires with those that are installed."""
    extra = "gpu" if _device() == "cuda" else "cpu"
    if not _version(PACKAGE):
        yield Finding(
            "versions", PACKAGE, "runs from a folder, not installed", "pip install --no-deps -e .", needed=True
        )
        return
    for text in metadata.requires(PACKAGE) or []:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is None or marker.evaluate({"extra": extra}):
            yield _package(requirement, needed=marker is None)


def _package(requirement: Requirement, *, needed: bool) -> Finding:
    wanted = str(requirement.specifier)
    install = f"pip install '{requirement.name}{wanted}'"
    version = _version(requirement.name)
    if not version:
        return Finding("versions", requirement.name, "not installed", install, needed)
    if requirement.specifier.contains(version.partition("+")[0], prereleases=True):
        return Finding("versions", requirement.name, version)
    return Finding("versions", requirement.name, f"{version}, but {wanted} is needed", install, needed)


def _strangers() -> Iterator[Finding]:
    """Published builds of these are for CUDA: beside a CPU torch they break the import of transformers."""
    if not _version("torch").endswith("+cpu"):
        return
    present = [name for name in ("torchvision", "torchaudio", "torchcodec") if _version(name)]
    for name in present:
        fix = f"pip uninstall -y {name}"
        yield Finding("versions", name, "breaks `import transformers` beside a CPU build of torch", fix, needed=True)


def _version(package: str) -> str:
    """The installed version; empty where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _accelerators() -> Iterator[Finding]:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    yield Finding("accelerators", "CPU", f"{psutil.cpu_count()} cores, {capability}, torch {torch.__version__}")
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        state = f"{device.name}, {device.total_memory / GIB:.0f} GiB, compute {device.major}.{device.minor}"
        yield Finding("accelerators", f"GPU {index}", state)
    if torch.cuda.device_count():
        return
    if _device() == "cuda":
        fix = "install the CUDA build: pip install -r requirements/gpu.txt (and unset CUDA_VISIBLE_DEVICES)"
        yield Finding("accelerators", "GPU", "its driver answers, but torch sees none", fix, needed=True)
    else:
        yield Finding("accelerators", "GPU", "none: everything runs on the CPU")


def _attention() -> Iterator[Finding]:
    import torch

    from rlhf_ray.models.forward.attention_backends import KERNELS, obstacle

    for backend in KERNELS:
        reason = obstacle(backend, torch.bfloat16, torch.device(_device()))
        package = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}.get(backend)
        lacks = reason is not None and "not installed" in reason
        fix = f"pip install --no-build-isolation {package}" if lacks else ""
        yield Finding("attention", backend, reason or "works", fix)


def _kernels() -> Iterator[Finding]:
    import torch

    from rlhf_ray.models.forward.liger import liger_obstacle
    from rlhf_ray.models.weights.quantization import INSTALL

    version = _version("bitsandbytes")
    state = f"works (bitsandbytes {version})" if version else "the package bitsandbytes is not installed"
    yield Finding("quantisation", "nf4", state, "" if version else INSTALL)
    reason = liger_obstacle(torch.device(_device()))
    fix = "pip install liger-kernel" if reason is not None and "not installed" in reason else ""
    yield Finding("kernels", "liger", reason or "works", fix)


def _memory() -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    state = f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB available"
    yield Finding("memory", "RAM", state)
    for name, path in (("disk here", Path.cwd()), ("/dev/shm", SHARED_MEMORY)):
        if not path.is_dir():
            continue
        usage = shutil.disk_usage(path)
        small = path == SHARED_MEMORY and usage.total < LEAST_SHARED_GIB * GIB
        fix = "give the container more: docker run --shm-size=2g (Ray's object store lies there)" if small else ""
        yield Finding("memory", name, f"{usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free", fix)
