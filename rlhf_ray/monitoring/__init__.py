"""Monitoring: one registry of metrics, and everything that shows them. It decides nothing."""

from __future__ import annotations

from rlhf_ray.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Answer": ".summary",
        "BestOf": ".summary",
        "Check": ".summary",
        "Figure": ".summary",
        "JsonLines": ".jsonl",
        "MemoryRecord": ".summary",
        "MemorySampler": ".memory",
        "Metric": ".registry",
        "MetricsLog": ".metrics_log",
        "PHASES": ".registry",
        "PhaseClock": ".phases",
        "PhaseGauge": ".ray_export",
        "REGISTRY": ".registry",
        "RayExporter": ".ray_export",
        "Sample": ".summary",
        "Summary": ".summary",
        "Table": ".summary",
        "TensorBoardWriter": ".tensorboard",
        "UnknownMetricError": ".registry",
        "memory_use": ".memory",
        "render_dashboard": ".dashboards",
        "render_report": ".report",
    },
)
