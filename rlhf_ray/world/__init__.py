"""A generated world of customer letters and sums, whose gold score is known exactly: for the demo and for tests.

Invariant: importing this package imports none of its modules; a public name imports what it needs.
"""

from __future__ import annotations

from rlhf_ray.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "World": ".generate",
        "answer_measures": ".gold",
        "arithmetic_score": ".gold",
        "gold_score": ".gold",
        "make_probes": ".probes",
    },
)
