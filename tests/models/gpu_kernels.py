"""Kernels that torch has on a GPU only, registered on the CPU in plain arithmetic, so that what calls them runs in tests.

They check what the real ones demand of their arguments, and round where those round. They say nothing about speed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

HALF_PRECISION = (torch.bfloat16, torch.float16)


@contextmanager
def half_precision_products() -> Iterator[None]:
    """Register ``torch.mm`` and ``torch.addmm`` with ``out_dtype``, which multiply in half precision and sum in fp32."""
    library = torch.library.Library("aten", "IMPL")

    def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
        assert left.dtype == right.dtype and left.dtype in HALF_PRECISION and out_dtype == torch.float32
        return left.float() @ right.float()

    def addmm(
        total: Tensor,
        left: Tensor,
        right: Tensor,
        out_dtype: torch.dtype,
        *,
        out: Tensor,
        beta: float = 1,
        alpha: float = 1,
    ) -> Tensor:
        assert out.dtype == out_dtype and total.dtype in (out_dtype, left.dtype)
        return out.copy_(beta * total + alpha * mm(left, right, out_dtype))

    library.impl("mm.dtype", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    yield
    del library
