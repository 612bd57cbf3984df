"""One DeepSpeed engine around one model: accumulate, vote, apply; whole weights by their names on disk; shards.

Always true: the gradient of an update does not depend on how its batch was split, a skipped update changes nothing on any
rank, and the room does not know which algorithm runs.
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
    },
)
