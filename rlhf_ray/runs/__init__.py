"""The directory of a training run: its checkpoints, its ledger of used prompts, its report, and how a run is resumed."""

from __future__ import annotations

from rlhf_ray.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Checkpoint": ".checkpoints",
        "CheckpointStore": ".checkpoints",
        "Ledger": ".ledger",
        "LedgerEntry": ".ledger",
        "RunDirectory": ".directory",
        "write_report": ".reporting",
    },
)
