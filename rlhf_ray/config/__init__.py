"""Typed and strict configs: what a job is, how it is read, and everything that can be wrong with it."""

from rlhf_ray.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "check_files": ".preflight",
        "dump_config": ".loading",
        "hub_ids": ".preflight",
        "load_config": ".loading",
        "parse_config": ".loading",
        "recipes": ".recipes",
    },
)
