"""What a run logs is what the glossary explains."""

from __future__ import annotations

import re
from pathlib import Path

from rlhf_ray.monitoring.registry import REGISTRY
from rlhf_ray.runs.directory import RunDirectory

PAGE = Path(__file__).parents[2] / "docs" / "monitoring.md"
NO_METRICS = {"step", "timestamp"}


def unexplained(run: RunDirectory) -> set[str]:
    """Metrics of a run that are not in the registry, or stand on the page neither by name nor by their family."""
    logged = {name for line in run.metrics.read() for name in line} - NO_METRICS
    explained = set(re.findall(r"^\| `([^`]+)`", PAGE.read_text(), re.MULTILINE))
    families = tuple(name.removesuffix("*") for name in explained if name.endswith("/*"))
    assert logged, "a run without metrics proves nothing"
    return {name for name in logged if name not in REGISTRY or not (name in explained or name.startswith(families))}
