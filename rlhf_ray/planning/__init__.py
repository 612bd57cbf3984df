"""What a job will do and what it needs of a cluster, before anything is allocated."""

from rlhf_ray.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Bundle": ".capacity",
        "batch_table": ".arithmetic",
        "capacity_table": ".capacity",
        "fits": ".capacity",
        "needed": ".capacity",
        "require_fit": ".capacity",
    },
)
