"""How far a share that was counted can lie from the true one.

Invariant: an interval lies within [0, 1] and holds the share itself, also where that is 0 or 1.
"""

from __future__ import annotations

import math

from rlhf_ray.errors import RequestError

Z_95 = 1.959963984540054
"""The 97.5 % quantile of the normal distribution, for intervals of 95 %."""


def wilson_interval(share: float, count: int, z: float = Z_95) -> tuple[float, float]:
    """Return Wilson's score interval (1927) for a share of ``count`` independent trials; by default of 95 %."""
    if count < 1 or not 0.0 <= share <= 1.0:
        raise RequestError(f"a share of {share} of {count} trials has no interval: give 0 to 1 of one or more")
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return min(max(middle - half, 0.0), share), max(min(middle + half, 1.0), share)
