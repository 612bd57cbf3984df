"""A run that started Ray by itself tells Prometheus where its metrics are; what a real one says is in ``test_restarts.py``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_ray.actors import cluster as clusters
from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.actors.connection import StartedRay
from rlhf_ray.config.sections.run import ClusterConfig, RunConfig


@pytest.mark.parametrize("dashboard", [True, False])
def test_prometheus_is_told_with_rays_dashboard_too_whose_file_other_dashboards_write(
    dashboard: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(clusters, "_is_connected", lambda: False)
    monkeypatch.setattr(clusters, "start_ray", lambda **options: StartedRay(tmp_path, "127.0.0.1:1"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with Cluster(ClusterConfig(num_cpus=1, dashboard=dashboard), RunConfig(name="named")):
        (file,) = tmp_path.glob("rlhf_ray_targets_*.json")
        assert json.loads(file.read_text())[0]["targets"] == ["127.0.0.1:1"]
    assert not [*tmp_path.iterdir()]
