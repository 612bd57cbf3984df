"""A cluster that cannot be joined is one sentence within seconds, and a run that was refused for it leaves nothing behind."""

from __future__ import annotations

import socket
import time
from collections.abc import Collection, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_ray.actors.connection import GCS_FLAG, LOOPBACK_ONLY, ONE_ATTEMPT, JoinedCluster, join_ray
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.errors import RequestError
from rlhf_ray.launch.driver import continue_run, train_new_run
from rlhf_ray.runs.clusters import remember
from rlhf_ray.runs.directory import RunDirectory

SMALL = ("policy.model.make.shape=llama-tiny", "data.world.demonstrations=64", "batch.sequences_per_update=32")
SECONDS = 15.0


@pytest.fixture
def unused(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An address where nothing listens, as of a head that is gone."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{held.getsockname()[1]}"


def config(tmp_path: Path) -> str:
    return dump_config(load_config("demo-sft", [*SMALL, f"run.root={tmp_path}"]))


def test_a_head_that_is_gone_is_a_sentence_and_leaves_no_run(
    unused: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", unused)
    began = time.monotonic()
    with pytest.raises(
        RequestError, match=f"no Ray cluster answers at {unused}: Connection refused.*RAY_ADDRESS=local"
    ):
        train_new_run(config(tmp_path))
    assert time.monotonic() - began < SECONDS
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_joined_a_cluster_is_not_resumed_on_a_ray_of_its_own(unused: str, tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "demo-sft", config(tmp_path))
    remember(run, JoinedCluster(unused, "session_of_then"))
    run.release()
    with pytest.raises(
        RequestError, match=f"no Ray cluster answers at {unused}: Connection refused.*RAY_ADDRESS=local"
    ):
        continue_run(str(run.path))


@pytest.mark.parametrize(
    "address",
    ["10.0.0.1", "10.0.0.1:port", "dashboard", ":6379", "http://", "ray://10.0.0.1:10001", "a" * 300 + ":6379"],
)
def test_what_is_no_address_is_a_sentence(address: str) -> None:
    with pytest.raises(RequestError, match=r"neither auto nor host:port|no Ray cluster answers at") as caught:
        join_ray(address)
    assert address in str(caught.value)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """Whatever runs on this machine, ``auto`` finds the raylets listed here and the head that was started last."""
    running: list[SimpleNamespace] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("psutil.process_iter", lambda attributes: iter(running))
    (tmp_path / "ray").mkdir()
    return running


def raylet(address: str) -> SimpleNamespace:
    return SimpleNamespace(info={"name": "raylet", "cmdline": ["raylet", f"--gcs-address={address}"]})


def test_auto_finds_the_cluster_of_this_machine_else_the_last_one_started_here(
    unused: str, tmp_path: Path, nodes: list[SimpleNamespace]
) -> None:
    with pytest.raises(RequestError, match="no Ray cluster runs on this machine, so auto finds none"):
        join_ray("auto")
    (tmp_path / "ray" / "ray_current_cluster").write_text(unused)
    with pytest.raises(RequestError, match=rf"no Ray cluster answers at auto \(which is {unused} here\)"):
        join_ray("auto")
    nodes.append(raylet("10.0.0.1:port"))
    with pytest.raises(RequestError, match=r"the cluster address 10\.0\.0\.1:port"):
        join_ray("auto")


def test_auto_does_not_choose_among_several_clusters(nodes: list[SimpleNamespace]) -> None:
    nodes += [raylet("10.0.0.1:6379"), raylet("10.0.0.2:6379"), raylet("10.0.0.2:6379")]
    with pytest.raises(
        RequestError, match=r"several Ray clusters run on this machine \(10.0.0.1:6379, 10.0.0.2:6379\)"
    ):
        join_ray("auto")


@pytest.mark.parametrize(
    ("module", "words"),
    [("ray_constants.py", LOOPBACK_ONLY), ("node.py", ONE_ATTEMPT), ("services.py", [GCS_FLAG.rstrip("=")])],
)
def test_ray_still_reads_what_it_is_told_in_words_of_its_own(module: str, words: Collection[str]) -> None:
    """They are not among the options of ``ray.init``: another version of Ray may have other words."""
    source = (Path(str(find_spec("ray").origin)).parent / "_private" / module).read_text()  # type: ignore[union-attr]
    assert [word for word in words if f'"{word}"' not in source] == []
