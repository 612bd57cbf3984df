"""The cases in which another number of ranks goes on than saved, and how two curves of losses are compared."""

from __future__ import annotations

import math
from typing import Any

UPDATES_BEFORE, UPDATES_AFTER = 5, 10
CASES: dict[str, dict[str, Any]] = {
    **{f"{dtype}-zero{zero}": {"zero": zero, "dtype": dtype} for dtype in ("fp32", "bf16") for zero in range(4)},
    **{f"tied-zero{zero}": {"zero": zero, "dtype": "fp32", "tied": True} for zero in (1, 2, 3)},
    **{f"alone-zero{zero}": {"zero": zero, "dtype": "fp32", "alone": True} for zero in (1, 2, 3)},
    **{f"offload-zero{zero}": {"zero": zero, "dtype": "fp32", "offload": "optimizer"} for zero in (2, 3)},
}
"""What their engines and models are made with."""
STARTS: dict[str, dict[str, Any]] = {f"start-zero{zero}": {"zero": zero, "dtype": "fp32"} for zero in range(4)}
"""Saved before the first update."""
BACK = ("fp32-zero2", "fp32-zero3")
"""Those in which the ranks that had saved go on again with what the others have made of it."""


def farthest(curve: list[float], expected: list[float]) -> float:
    """The largest difference of two curves; NaN where one has a NaN."""
    assert len(curve) == len(expected) > 0
    return max((abs(a - b) for a, b in zip(curve, expected, strict=True)), key=lambda x: (math.isnan(x), x))
