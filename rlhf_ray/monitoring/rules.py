"""Generate Prometheus' rules from the alarms of the registry.

Invariants: every alarm of the registry is a rule, and no rule is anything else. A rule comes after those that explain it, which
Prometheus evaluates first. The committed ``deploy/monitoring/rlhf_ray_rules.yml`` is what :func:`render_rules` returns; after a
change write it anew: ``python -m rlhf_ray.monitoring.rules deploy/monitoring/rlhf_ray_rules.yml``.
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rlhf_ray.monitoring.registry import REGISTRY
from rlhf_ray.storage.output import OutputFile

INTERVAL_S = 15
"""How often Prometheus evaluates the rules."""
HEAD = (
    "# Made from the alarms in rlhf_ray/monitoring/alarms/catalogue.py by: python -m rlhf_ray.monitoring.rules FILE\n"
)


def series(name: str) -> str:
    """The series of a metric in Prometheus."""
    return REGISTRY[name].series


def rules() -> dict[str, Any]:
    """The file as a mapping."""
    every = [
        {
            "alert": alarm.name,
            "expr": alarm.query(series),
            "labels": {"severity": alarm.severity},
            "annotations": {"summary": f"{{{{ $labels.run }}}}: {alarm.meaning}", "description": alarm.way_out},
        }
        for alarm in REGISTRY.alarms
    ]
    return {"groups": [{"name": "rlhf_ray", "interval": f"{INTERVAL_S}s", "rules": every}]}


def render_rules() -> str:
    """The file as YAML text."""
    yaml, text = YAML(), io.StringIO()
    yaml.width = 120
    yaml.dump(rules(), text)
    return HEAD + text.getvalue()


if __name__ == "__main__":
    OutputFile(Path(sys.argv[1]), "the rules", overwrite=True).write(render_rules())
