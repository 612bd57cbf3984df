"""Where ranks meet, which is loopback where all of them share a node, and how long they wait for one another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.actors.groups import Group
from rlhf_ray.actors.place import RankSpec, place_group
from rlhf_ray.actors.workers import rollout
from rlhf_ray.actors.workers.base import Worker
from rlhf_ray.actors.workers.model import WorkerSetup
from rlhf_ray.actors.workers.policy import LanguageSetup, PolicyWorker
from rlhf_ray.actors.workers.rollout import RolloutSetup, RolloutWorker
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.config.sections.run import ClusterConfig
from rlhf_ray.errors import RlhfRayError, StorageError
from rlhf_ray.network import LOOPBACK, variables_at
from rlhf_ray.pending import Pending
from rlhf_ray.storage.shared import SharedFile


class Ranks:
    """Ranks at these addresses, where rank 0 is given this port."""

    role = "policy"

    def __init__(self, addresses: Sequence[str], port: int | None) -> None:
        self.addresses, self.port, self.size = addresses, port, len(addresses)
        self.held: list[str] = []
        self.setups: list[WorkerSetup] = []

    def call(
        self,
        method: str,
        arguments: Sequence[tuple[Any, ...]],
        *,
        phase: str | None = None,
        key: str | None = None,
        timeout_s: float | None = None,
    ) -> Pending[list[Any]]:
        if method == "node_address":
            return Pending.done(list(self.addresses))
        if method == "hold_rendezvous":
            self.held += [address for (address,) in arguments]
            return Pending.done([self.port] + [None] * (self.size - 1))
        self.setups += [setup for (setup,) in arguments]
        return Pending.done(["loaded"] * self.size)


@pytest.mark.parametrize(
    ("addresses", "port", "rendezvous"),
    [
        (["10.0.0.1", "10.0.0.2"], 4000, ("10.0.0.1", 4000)),
        (["10.0.0.1", "10.0.0.1"], 4000, (LOOPBACK, 4000)),
        (["10.0.0.1", "10.0.0.2"], None, None),  # ranks that share nothing but the requests
        (["10.0.0.1"], 4000, None),
    ],
    ids=["two nodes", "one node", "no meeting", "a lone rank"],
)
def test_only_ranks_on_several_nodes_meet_where_others_reach_them(
    addresses: list[str], port: int | None, rendezvous: tuple[str, int] | None
) -> None:
    ranks = Ranks(addresses, port)
    Group(ranks).setup(WorkerSetup(RoleConfig(model=ModelConfig(path="m")), seed=0), timeout_s=1.0).result()  # type: ignore[arg-type]
    assert [setup.rendezvous for setup in ranks.setups] == [rendezvous] * len(addresses)
    assert set(ranks.held) == (
        set() if len(addresses) == 1 else {LOOPBACK if len(set(addresses)) == 1 else addresses[0]}
    )


@pytest.mark.parametrize(("parallel", "address"), [(1, LOOPBACK), (2, "10.0.0.1")])
def test_an_engine_is_told_the_interface_before_vllm_looks_for_one(
    parallel: int, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Engine(RolloutWorker):
        def node_address(self) -> str:
            return "10.0.0.1"

    wanted = variables_at(address)
    for name in variables_at(LOOPBACK):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "chosen")
    seen: dict[str, str] = {}
    monkeypatch.setattr(rollout, "make_engine", lambda *_: seen.update(os.environ))
    config = RolloutConfig(tensor_parallel=parallel)
    try:
        Engine().setup(RolloutSetup(config, "model", (), seed=0, deterministic=False))
    finally:
        for name in wanted:
            os.environ.pop(name, None)
    assert {name: seen.get(name) for name in wanted} == wanted | (
        {"NCCL_SOCKET_IFNAME": "chosen"} if "NCCL_SOCKET_IFNAME" in wanted else {}
    )
    assert seen["NCCL_SOCKET_IFNAME"] == "chosen", "what the user has set stands"


def test_a_rank_whose_node_does_not_see_the_run_names_the_node_and_the_way_out(tmp_path: Path) -> None:
    attempts = tmp_path / "run" / "attempts.jsonl"
    attempts.parent.mkdir()
    attempts.write_text("1\n")
    shared = SharedFile.at(attempts)
    Worker(rank=1, world_size=2).require_shared(shared)
    Worker().require_shared(None)
    attempts.unlink()
    sentence = rf"node {LOOPBACK} \(.+\) does not see the run directory {attempts.parent}, .* rank 1 .*run\.root"
    with pytest.raises(StorageError, match=sentence):
        Worker(rank=1, world_size=2).require_shared(shared)


@pytest.mark.parametrize(
    ("worker", "setup"),
    [
        (RolloutWorker(), RolloutSetup(RolloutConfig(), "no model", (), seed=0, deterministic=False)),
        (PolicyWorker(), LanguageSetup(RoleConfig(model=ModelConfig(path="no model")), seed=0, temperature=1.0)),
    ],
    ids=["rollout", "policy"],
)
def test_a_rank_looks_for_the_run_directory_before_it_loads_anything(
    worker: Worker, setup: Any, tmp_path: Path
) -> None:
    attempts = tmp_path / "attempts.jsonl"
    attempts.touch()
    shared = SharedFile.at(attempts)
    attempts.unlink()
    refusal = ""
    try:
        worker.setup(replace(setup, shared=shared))  # type: ignore[attr-defined]
    except RlhfRayError as error:
        refusal = str(error)
    assert "does not see the run directory" in refusal


class Place:
    """Where ranks are started under these limits."""

    def __init__(self, config: ClusterConfig) -> None:
        self.config, self.ranks = config, Ranks(["10.0.0.1", "10.0.0.2"], 4000)

    def start(self, spec: RankSpec) -> Ranks:
        return self.ranks


@pytest.mark.parametrize(("start", "call"), [(300.0, 3600.0), (1800.0, 600.0)])
def test_no_collective_gives_up_before_the_call_that_it_is_part_of(start: float, call: float) -> None:
    place: Any = Place(ClusterConfig(start_timeout_s=start, call_timeout_s=call))
    setup = WorkerSetup(RoleConfig(model=ModelConfig(path="m"), ranks=2), seed=0)
    place_group(place, "policy", Group, setup).load().result()
    assert [setup.collective_timeout_s for setup in place.ranks.setups] == [max(start, call)] * 2
