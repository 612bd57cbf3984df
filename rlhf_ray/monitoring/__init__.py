"""The metrics of a run: one registry of names, and everything that writes or shows them. Nothing here changes a run."""

from __future__ import annotations

from rlhf_ray.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Answer": ".report.summary",
        "BestOf": ".report.summary",
        "Check": ".report.summary",
        "Figure": ".report.summary",
        "MemoryRecord": ".report.summary",
        "MemorySampler": ".memory",
        "Metric": ".registry",
        "MetricsLog": ".metrics_log",
        "PHASES": ".registry",
        "PhaseClock": ".phases",
        "PhaseGauge": ".ray_export",
        "REGISTRY": ".registry",
        "RayExporter": ".ray_export",
        "Sample": ".report.summary",
        "Summary": ".report.summary",
        "Table": ".report.summary",
        "UnknownMetricError": ".registry",
        "memory_use": ".memory",
        "render_report": ".report.page",
    },
)
