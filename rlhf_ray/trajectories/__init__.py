"""The batch of token sequences that flows through a step, how it is packed for a model, and which rank runs what.

Invariants: importing this package imports neither torch nor any of its modules, and ``trajectories.schedule`` never needs
torch.
"""

from __future__ import annotations

from rlhf_ray.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "PER_SEQUENCE": ".columns",
        "PER_TOKEN": ".columns",
        "BatchError": ".column_checks",
        "COLUMNS": ".columns",
        "Column": ".columns",
        "FINISH_REASONS": ".columns",
        "FinishReason": ".columns",
        "MicroBatch": ".schedule",
        "Packed": ".packing",
        "Schedule": ".schedule",
        "TrajectoryBatch": ".batch",
        "Update": ".schedule",
        "make_schedule": ".schedule",
        "pack": ".packing",
        "scatter_sequences": ".batch",
        "scatter_tokens": ".batch",
    },
)
