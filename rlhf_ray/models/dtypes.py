"""The number formats of weights: the names that configs give them, and torch's types.

Invariant: this is the only table of dtypes in the package.
"""

from __future__ import annotations

import torch

from rlhf_ray.config.sections.models import Dtype
from rlhf_ray.errors import ModelLoadError

DTYPES: dict[Dtype, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LONG_NAMES: dict[Dtype, str] = {name: str(dtype).removeprefix("torch.") for name, dtype in DTYPES.items()}
"""What config.json and vLLM call them: bfloat16, float16, float32."""


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's type for a name such as bf16; an unknown name is refused."""
    for known, dtype in DTYPES.items():
        if known == name:
            return dtype
    raise ModelLoadError(f"unknown dtype {name!r}: choose one of {', '.join(DTYPES)}")


def dtype_name(dtype: torch.dtype) -> Dtype:
    """Return the name that configs give to a dtype."""
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise ModelLoadError(f"weights of {dtype} are not supported: choose one of {', '.join(DTYPES)}")
