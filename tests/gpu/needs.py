"""What a check needs of the machine, and why a machine lacks it.

Always true: asking costs no import of what is asked for, except torch for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from importlib.util import find_spec


def _package(module: str, install: str) -> Callable[[str], str | None]:
    """Ask for an importable module."""
    return lambda device: None if find_spec(module) is not None else f"the package {install} is not installed"


def _device(device: str) -> str | None:
    """The device that the checks run on."""
    if find_spec("torch") is None:
        return "the package torch is not installed"
    import torch

    return None if device == "cpu" or torch.cuda.is_available() else "torch sees no GPU"


def _cuda_kernel(device: str) -> str | None:
    return "it needs a CUDA kernel" if device == "cpu" else None


def _second_gpu(device: str) -> str | None:
    if _device(device) is not None or device == "cpu":
        return "there is no second GPU"
    import torch

    return None if torch.cuda.device_count() > 1 else "there is no second GPU"


NEEDS: dict[str, Callable[[str], str | None]] = {
    "device": _device,
    "cuda kernel": _cuda_kernel,
    "second GPU": _second_gpu,
    "transformers": _package("transformers", "transformers"),
    "jaxtyping": _package("jaxtyping", "jaxtyping"),
    "rich": _package("rich", "rich"),
    "pydantic": _package("pydantic", "pydantic"),
    "flash_attn": _package("flash_attn", "flash-attn"),
    "bitsandbytes": _package("bitsandbytes", "bitsandbytes"),
    "peft": _package("peft", "peft"),
    "liger_kernel": _package("liger_kernel", "liger-kernel"),
    "deepspeed": _package("deepspeed", "deepspeed"),
    "ray": _package("ray", "ray"),
    "vllm": _package("vllm", "vllm"),
}
"""By name: a question about a device (``cuda`` or ``cpu``) that answers None, or what is missing."""


def missing(needs: Iterable[str], device: str) -> list[str]:
    """What is missing of these on a device, in words."""
    return [reason for need in needs if (reason := NEEDS[need](device)) is not None]
