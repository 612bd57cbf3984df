"""Training of one model on one or several ranks with DeepSpeed: gradients, optimizer steps, checkpoints, whole weights.

Invariants: the gradient of an update does not depend on how its batch was split. A skipped update changes nothing on any
rank. Nothing in this package knows which algorithm runs.
"""

from __future__ import annotations

from rlhf_ray.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Applied": ".report",
        "Engine": ".engine",
        "Report": ".report",
        "SkippableAdamW": ".optimizer",
        "deepspeed_config": ".settings",
        "destroy_process_group": ".distributed",
        "init_process_group": ".distributed",
        "learning_rate": ".schedules",
        "rendezvous": ".distributed",
    },
)
