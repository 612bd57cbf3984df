"""What Ray's dashboard and Prometheus know of a run that started Ray by itself: where its metrics are, its name, its ranks."""

from __future__ import annotations

import json
import os
import urllib.request
from pathlib import Path

import pytest
import ray
from ray._raylet import ActorID, GcsClient
from ray.core.generated.gcs_pb2 import ActorTableData
from ray.util.placement_group import placement_group_table

from rlhf_ray.actors import cluster as clusters
from rlhf_ray.actors.cluster import Cluster
from rlhf_ray.actors.connection import StartedRay
from rlhf_ray.actors.place import RankSpec
from rlhf_ray.config.sections.engine import ResourcesConfig
from rlhf_ray.config.sections.run import ClusterConfig, RunConfig


@pytest.mark.early
def test_a_run_is_found_by_prometheus_and_reads_well_in_rays_dashboard() -> None:
    """Read from where the dashboard reads it: job and actor tables of Ray's control service, in 2.60."""
    assert not ray.is_initialized()
    with Cluster(ClusterConfig(num_cpus=1, object_store_mb=100), RunConfig(name="named")) as cluster:
        resources = ResourcesConfig(cpus_per_rank=1, gpus_per_rank=0)
        ranks = cluster.start(RankSpec("reward", 1, resources, name="reward-helpful"))
        ranks.call("health", [()]).result()
        session = Path(ray._private.worker._global_node.get_session_dir_path())
        targets = session.parent / f"rlhf_ray_targets_{os.getpid()}.json"
        ((page,),) = (entry["targets"] for entry in json.loads(targets.read_text()))
        with urllib.request.urlopen(f"http://{page}/metrics", timeout=30) as answer:
            assert b"ray_" in answer.read()
        address = ray.get_runtime_context().gcs_address
        jobs = GcsClient(address=address).get_all_job_info().values()
        assert [dict(job.config.metadata)["job_name"] for job in jobs] == ["named"]
        accessor = ray._private.state.state._connect_and_get_accessor()
        (actor,) = ranks.actors
        told = ActorTableData.FromString(accessor.get_actor_info(ActorID.from_hex(actor._actor_id.hex())))
        assert (told.name, told.repr_name) == ("rlhf/named/reward-helpful/0", "reward-helpful/0")
        assert {entry["name"] for entry in placement_group_table().values()} == {"rlhf/named/reward-helpful/0"}
    assert not targets.exists()


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
