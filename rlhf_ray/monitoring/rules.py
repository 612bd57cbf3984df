"""Generate Prometheus' rules from the alarms of the registry.

Invariants: every alarm of the registry and of the service is a rule, and no rule is anything else. A rule comes after those
that explain it, which Prometheus evaluates first. The committed ``deploy/monitoring/rlhf_ray_rules.yml`` is what
:func:`render_rules` returns; after a change write it anew:
``python -m rlhf_ray.monitoring.rules deploy/monitoring/rlhf_ray_rules.yml``.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from rlhf_ray.monitoring.alarms.alarm import Alarm
from rlhf_ray.monitoring.alarms.service import SERVICE_ALARMS, ServiceAlarm
from rlhf_ray.monitoring.registry import REGISTRY
from rlhf_ray.storage.output import OutputFile

INTERVAL_S = 15
"""How often Prometheus evaluates the rules."""
HEAD = "# Made from the alarms in rlhf_ray/monitoring/alarms by: python -m rlhf_ray.monitoring.rules FILE\n"


def series(name: str) -> str:
    """The series of a metric in Prometheus."""
    return REGISTRY[name].series


def rules() -> dict[str, Any]:
    """The file as a mapping."""
    of_runs = [_rule(alarm, alarm.query(series), "run") for alarm in REGISTRY.alarms]
    of_services = [_rule(alarm, alarm.query(), "instance") for alarm in SERVICE_ALARMS]
    return {"groups": [_group("rlhf_ray", of_runs), _group("rlhf_ray_services", of_services)]}


def _group(name: str, rules: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"name": name, "interval": f"{INTERVAL_S}s", "rules": list(rules)}


def _rule(alarm: Alarm | ServiceAlarm, query: str, subject: str) -> dict[str, Any]:
    return {
        "alert": alarm.name,
        "expr": query,
        "labels": {"severity": alarm.severity},
        "annotations": {"summary": f"{{{{ $labels.{subject} }}}}: {alarm.meaning}", "description": alarm.way_out},
    }


def render_rules() -> str:
    """The file as YAML text."""
    yaml, text = YAML(), io.StringIO()
    yaml.width = 120
    yaml.dump(rules(), text)
    return HEAD + text.getvalue()


if __name__ == "__main__":
    OutputFile(Path(sys.argv[1]), "the rules", overwrite=True).write(render_rules())
