"""A run that joined a Ray cluster goes on there, on whichever node that is asked for, unless the user says otherwise."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.actors.connection import JoinedCluster
from rlhf_ray.config.loading import load_config
from rlhf_ray.runs.clusters import on_its_cluster, remember, remembered
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.reporting import status

JOINED = JoinedCluster("10.0.0.1:6379", "session_2026")
OTHER = JoinedCluster("10.0.0.9:6379", "session_2027")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    run = RunDirectory.create(tmp_path / "run", "kind: sft\n")
    run.release()
    return run


def resumed(run: RunDirectory) -> RunDirectory:
    """Another attempt."""
    again, _ = RunDirectory.resume(run.path)
    again.release()
    return again


def address(run: RunDirectory, *overrides: str) -> str | None:
    return on_its_cluster(load_config("demo-sft", overrides), run).cluster.address


def test_the_last_attempt_that_came_so_far_says_where_the_run_goes_on(run: RunDirectory) -> None:
    assert remembered(run) is None and address(run) is None
    remember(run, JOINED)
    assert remembered(RunDirectory.open(run.path)) == JOINED
    assert [line["attempt"] for line in run.attempts.read()] == [1]
    second = resumed(run)  # and it is refused before it joins anything
    assert second.attempt == 2
    assert remembered(second) == JOINED and address(second) == JOINED.address
    remember(second, OTHER)
    assert address(second) == OTHER.address
    third = resumed(run)
    remember(third, None)
    assert remembered(third) is None and address(third) is None


def test_a_user_who_says_where_to_go_on_is_heard(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    remember(run, JOINED)
    assert address(run, "cluster.address=auto") == "auto"
    for elsewhere in (OTHER.address, "local"):
        monkeypatch.setenv("RAY_ADDRESS", elsewhere)
        assert address(run) is None, "RAY_ADDRESS counts where the config names no cluster"


def test_cpus_of_a_ray_started_here_do_not_count_on_the_cluster(run: RunDirectory) -> None:
    remember(run, JOINED)
    assert on_its_cluster(load_config("demo-sft", ["cluster.num_cpus=2"]), run).cluster.num_cpus is None


def test_status_names_the_cluster_and_how_to_go_on_from_elsewhere(run: RunDirectory) -> None:
    assert "cluster" not in status(run) and "submit" not in status(run)["state"]
    remember(run, JOINED)
    assert status(run).get("cluster") == "10.0.0.1:6379 (session_2026)"
    assert f"rlhf-ray resume {run.path} on a node of its cluster" in status(run)["state"]
    assert f"rlhf-ray submit --resume {run.path}" in status(run)["state"]


@pytest.mark.parametrize("damaged", [5, [], {"address": "10.0.0.1:6379"}, {"address": 5, "session": "s"}])
def test_an_entry_that_somebody_edited_is_no_cluster(run: RunDirectory, damaged: object) -> None:
    run.attempts.amend_last({"cluster": damaged})
    assert remembered(run) is None
