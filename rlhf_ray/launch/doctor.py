"""``rlhf-ray doctor``: report what this machine can run, and what would let it run more.

Invariants: nothing is installed, started or downloaded; a kernel "works" only if it has just run; a problem comes with the
command that fixes it, if there is one; what is required is listed apart from what is merely absent.
"""

from __future__ import annotations

import importlib
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
from packaging.requirements import Requirement

from rlhf_ray.config.recipes import recipes
from rlhf_ray.console import table
from rlhf_ray.environment import Device
from rlhf_ray.errors import EXIT_DONE, EXIT_FAILED
from rlhf_ray.planning.gpus import count_gpus, driver_version

if TYPE_CHECKING:
    import torch

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
        findings += [*_accelerators(), *_tools(), *_attention(), *_kernels()]
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
        yield _driver(torch.version.cuda or "", driver_version())
    elif _device() == "cuda":
        fix = "install the CUDA build, as the head of requirements/gpu.txt says (and unset CUDA_VISIBLE_DEVICES)"
        yield Finding("accelerators", "GPU", "its driver answers, but torch sees none", fix, needed=True)
    else:
        yield Finding("accelerators", "GPU", "none: everything runs on the CPU")


def _driver(built_for: str, runs: tuple[int, int] | None) -> Finding:
    """Compare the CUDA that torch was built for with the newest that the driver runs; minor versions are compatible."""
    shown = "unknown" if runs is None else "{}.{}".format(*runs)
    state = f"the driver runs CUDA {shown}, torch was built for {built_for}"
    older = runs is not None and runs[0] < int(built_for.partition(".")[0] or 0)
    fix = (
        f"update NVIDIA's driver to one for CUDA {built_for}, or install a torch built for CUDA {shown}"
        if older
        else ""
    )
    return Finding("accelerators", "driver", state, fix, needed=True)


def _tools() -> Iterator[Finding]:
    """Triton compiles the launchers of its kernels with it when they first run."""
    compiler = next((name for name in ("gcc", "clang", "cc") if shutil.which(name)), None)
    fix = "" if compiler else "install one, such as gcc: vLLM, Liger and torch.compile need it on a GPU"
    yield Finding("tools", "C compiler", compiler or "none", fix, needed=_device() == "cuda")


def _seen_device() -> torch.device:
    """What torch can compute on here, on behalf of the jobs of this machine."""
    import torch

    return torch.device("cuda", 0) if torch.cuda.device_count() else torch.device("cpu")


def _failure(run: Callable[[], object]) -> str | None:
    """Why ``run`` fails, in one line; None if it does not."""
    try:
        run()
    except Exception as error:  # of a kernel, a driver or a compiler: whatever it is, it is what a job would meet
        return f"fails when it runs: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


def _attend(backend: str, device: torch.device) -> None:
    """Attention of two tokens with grouped heads, forward and backward, in bf16."""
    import torch

    from rlhf_ray.models.forward.attention_backends import KERNELS
    from rlhf_ray.models.forward.segments import Segments

    shapes = ((2, 2, 64), (2, 1, 64), (2, 1, 64))
    inputs = [torch.ones(shape, dtype=torch.bfloat16, device=device, requires_grad=True) for shape in shapes]
    segments = Segments.of(torch.tensor([0, 2], device=device))
    KERNELS[backend](*inputs, segments, scaling=0.125, window=None, softcap=None).sum().backward()
    if not all(one.grad is not None and bool(one.grad.isfinite().all()) for one in inputs):
        raise ValueError("its gradients are not finite")


def _attention() -> Iterator[Finding]:
    import torch

    from rlhf_ray.models.forward.attention_backends import KERNELS, obstacle

    device = _seen_device()
    for backend in KERNELS:
        reason = obstacle(backend, torch.bfloat16, device) or _failure(partial(_attend, backend, device))
        package = {"flash_attention_2": "flash-attn", "flash_attention_3": "flash-attn-3"}.get(backend)
        lacks = reason is not None and "not installed" in reason
        fix = f"pip install --no-build-isolation {package}" if lacks else ""
        yield Finding("attention", backend, reason or "works", fix)


def _kernels() -> Iterator[Finding]:
    from rlhf_ray.models.forward.liger import liger_obstacle
    from rlhf_ray.models.weights.quantization import INSTALL

    device, version = _seen_device(), _version("bitsandbytes")
    state = "the package bitsandbytes is not installed"
    if version:
        state = _failure(partial(_quantize, device)) or f"works (bitsandbytes {version})"
    yield Finding("quantisation", "nf4", state, "" if version else INSTALL)
    reason = liger_obstacle(device) or _failure(partial(_normalize, device))
    fix = "pip install liger-kernel" if reason is not None and "not installed" in reason else ""
    yield Finding("kernels", "liger", reason or "works", fix)


def _quantize(device: torch.device) -> None:
    import torch

    from rlhf_ray.models.weights.quantization import bitsandbytes

    package: Any = bitsandbytes()
    numbers = torch.linspace(-1.0, 1.0, 64 * 64, device=device).view(64, 64)
    again = package.functional.dequantize_4bit(*package.functional.quantize_4bit(numbers, quant_type="nf4"))
    if not torch.allclose(again, numbers, atol=0.2):
        raise ValueError("the numbers do not come back")


def _normalize(device: torch.device) -> None:
    """One of Liger's kernels, forward and backward; has not run on a GPU yet."""
    import torch

    norm = importlib.import_module("liger_kernel.transformers").LigerRMSNorm(64).to(device)
    norm(torch.ones(2, 64, device=device, requires_grad=True)).sum().backward()


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
