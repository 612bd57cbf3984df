"""Each dashboard goes through Grafana's own types (``grafana-foundation-sdk``) without losing a key: ``make dashboards``."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.monitoring.dashboards import BOARDS

PYTHON = os.environ.get("GRAFANA_SDK_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="grafana-foundation-sdk is not there: make dashboards")
DASHBOARDS = Path(__file__).parents[2] / "deploy" / "monitoring" / "dashboards"
ROUND_TRIP = """
import json, sys
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
plugins.register_default_plugins()
print(JSONEncoder().encode(Dashboard.from_json(json.load(sys.stdin))))
"""


def round_trip(model: dict[str, Any]) -> Any:
    command = [str(PYTHON), "-c", ROUND_TRIP]
    ended = subprocess.run(command, input=json.dumps(model), capture_output=True, text=True, timeout=60, check=True)
    return json.loads(ended.stdout)


def lost(before: Any, after: Any, place: str = "") -> list[str]:
    """The places that are not there any more, or hold something else; what is added is Grafana's default."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            text
            for key, value in before.items()
            for text in (lost(value, after[key], f"{place}/{key}") if key in after else [f"{place}/{key}"])
        ]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = zip(before, after, strict=True)
        return [text for number, (one, other) in enumerate(pairs) for text in lost(one, other, f"{place}/{number}")]
    return [] if before == after else [place]


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_no_key_is_lost(board: Any) -> None:
    model = json.loads((DASHBOARDS / f"{board.name}.json").read_text())
    assert lost(model, round_trip(model)) == []


def test_a_key_that_grafana_does_not_know_is_found() -> None:
    model = json.loads((DASHBOARDS / "faults.json").read_text())
    model["annotations"]["list"][0]["titleFormat"] = "{{alertname}}"
    model["panels"][0]["targets"][0]["expression"] = "up"
    assert lost(model, round_trip(model)) == ["/annotations/list/0/titleFormat", "/panels/0/targets/0/expression"]
