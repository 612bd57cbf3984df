"""Grafana's dashboards, made from the registry of metrics."""

from __future__ import annotations

from rlhf_ray.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {"BOARDS": ".boards", "Board": ".boards", "dashboard": ".boards", "expression": ".panels", "render": ".boards"},
)
