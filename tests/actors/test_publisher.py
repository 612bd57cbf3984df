"""The driver connects policy and engines once, again when an engine has died, and counts an update that failed as none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from rlhf_ray.actors.groups import PolicyGroup
from rlhf_ray.actors.publisher import Publisher
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.workers.policy import LanguageSetup, PolicyWorker
from rlhf_ray.config.sections.engine import ResourcesConfig
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.errors import DeadRankError, GroupError, RequestError
from rlhf_ray.pending import Pending
from rlhf_ray.rollout.execution import Execution
from rlhf_ray.rollout.fleet import Engines, Fleet
from rlhf_ray.rollout.health import EngineState
from rlhf_ray.rollout.requests import Probe
from rlhf_ray.rollout.weights.deadline import Taken
from rlhf_ray.rollout.wire import PublishedWeights
from tests.rollout.stand_ins import on_cpu
from tests.rollout.test_weight_sender import Worker, assert_same

GPU = "the-gpu"
ON_GPU = ResourcesConfig(gpus_per_rank=0.25)


class Policy(PolicyWorker):
    """A policy on the CPU, which says that it is on a GPU."""

    connections = 0

    def gpu(self) -> str | None:
        return GPU

    def connect_engines(self, *arguments: Any) -> None:
        self.connections += 1
        super().connect_engines(*arguments)


class Handle:
    """What the driver asks of an engine besides; it computes as the policy does."""

    dead: str | None = None

    def __init__(self, policy: PolicyWorker) -> None:
        self.policy = policy

    def execution(self) -> Pending[Execution]:
        return Pending.done(self.policy.execution("ipc", "merged"))

    def probe(self) -> Pending[Probe]:
        return Pending.done(Probe(self.dead, 0, 0))


class EngineOf(Worker):
    """An engine with one worker on that GPU."""

    def gpus(self) -> list[str]:
        return [GPU]


@pytest.fixture
def policy() -> Iterator[Policy]:
    worker = Policy()
    model = {"make": {"shape": "llama-tiny", "tokenizer_from": "world"}, "dtype": "bf16", "lora": {"rank": 2}}
    role = RoleConfig.model_validate({"model": model, "engine": {"optimizer": {"learning_rate": 0.02}}})
    worker.setup(LanguageSetup(role, seed=0, total_updates=1))
    with on_cpu():
        yield worker


def make(policy: Policy, **keys: Any) -> tuple[Publisher, Fleet, list[EngineOf]]:
    engines = [EngineOf() for _ in range(2)]
    ranks = [InProcessRanks("rollout", engine) for engine in engines]
    fleet = Fleet(Engines([Handle(policy), Handle(policy)]))  # type: ignore[list-item]  # nothing else is asked of them by a handle
    config = RolloutConfig(resources=ON_GPU, **keys)
    return Publisher(PolicyGroup(InProcessRanks("policy", policy)), fleet, ranks, config), fleet, engines


def test_engines_on_the_policys_gpu_read_its_memory_and_connect_anew_when_one_has_died(policy: Policy) -> None:
    publisher, fleet, engines = make(policy)
    assert publisher.transport == "ipc"
    for version in (1, 2):
        publisher.publish(version)
    assert policy.connections == 1
    expected = list(policy.disk_weights())
    for engine in engines:
        assert engine.version == 2
        assert_same(engine.recorder.weights, expected)
    fleet.health.died(0, "it was killed", 0)
    publisher.publish(3)
    assert policy.connections == 2
    assert (engines[0].version, engines[1].version) == (2, 3)
    assert fleet.health.healthy == (1,)


def test_an_engine_that_was_restarted_is_connected_again_though_it_has_the_same_number(policy: Policy) -> None:
    """The connection of the policy is to a process, and that one is gone."""
    publisher, fleet, _ = make(policy)
    publisher.publish(1)
    fleet.health.died(0, "it was killed", 0)
    fleet.health.started(0, fleet.health.restart(0))
    publisher.publish(2)
    assert policy.connections == 2
    assert fleet.health.healthy == (0, 1) and fleet.health[0].weight_version == 2
    publisher.publish(3)
    assert policy.connections == 2


def test_an_engine_that_died_unnoticed_is_left_out_and_fails_no_update(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, fleet, engines = make(policy)
    publisher.publish(1)
    monkeypatch.setattr(fleet.engines.handles[0], "dead", "it was killed")
    monkeypatch.setattr(engines[0], "begin_update", lambda: 1 / 0)
    publisher.publish(2)
    assert fleet.health.healthy == (1,) and engines[1].version == 2


def test_an_update_that_fails_counts_for_no_engine_and_names_the_way_out(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, fleet, engines = make(policy)
    publisher.publish(1)
    monkeypatch.setattr(engines[1], "take_sent", lambda info: 1 / 0)
    with pytest.raises(GroupError, match=r"division by zero[\s\S]*rollout.weight_transport=object_store") as caught:
        publisher.publish(2)
    assert caught.value.role == "policy" and "object_store" in caught.value.cause, "what crosses processes says it too"
    assert all(fleet.health[engine].state is EngineState.STALE for engine in range(2))


def test_an_engine_that_fails_fails_the_policy_whose_ranks_may_still_wait_for_one_another(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of several ranks that failed is not asked to save."""
    publisher, _, engines = make(policy)
    publisher.publish(1)

    def refuse(info: Any) -> None:
        raise GroupError("rollout", 1, "take_sent", "no memory is left")

    monkeypatch.setattr(engines[1], "take_sent", refuse)
    with pytest.raises(GroupError, match="rollout rank 1 failed in take_sent: no memory is left") as caught:
        publisher.publish(2)
    assert caught.value.role == "policy"


def test_the_object_store_can_be_asked_for(policy: Policy) -> None:
    publisher, _, _ = make(policy, weight_transport="object_store")
    assert publisher.transport == "object_store"


@pytest.mark.parametrize(
    ("keys", "parts"), [({"weight_delta": True}, ["delta"]), ({"lora": "adapter"}, ["adapter"]), ({}, [])], ids=str
)
def test_what_travels_follows_from_the_config_and_the_metrics_say_how_much(
    keys: dict[str, Any], parts: list[str], policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on GPUs, from one to the other of which only whole weights go."""
    publisher, fleet, _ = make(policy, **(keys or {"weight_transport": "object_store"}))
    assert publisher.transport == "object_store"
    taken: list[PublishedWeights] = []

    def receive(weights: PublishedWeights) -> Pending[Execution | None]:
        taken.append(weights)
        return Pending.done(policy.execution("object_store", "adapter" if "adapter" in parts else "merged"))

    for handle in fleet.engines.handles:
        monkeypatch.setattr(handle, "receive", receive, raising=False)
    for version in (1, 2):
        publisher.publish(version)
    newest = taken[-1]
    assert newest.version == 2 and [part for part in ("delta", "adapter") if getattr(newest, part) is not None] == parts
    share = publisher.figures.get("weights/sent_share")
    expected = {
        "delta": 0.0,
        "adapter": None if newest.adapter is None else newest.adapter.tensors.nbytes / newest.nbytes,
    }
    assert share == (expected[parts[0]] if parts else None), "nothing has changed, or the adapter's tensors, or all"


def test_what_goes_from_gpu_to_gpu_has_the_time_that_its_bytes_took_before(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, _, _ = make(policy, update_timeout_s=1e-6)
    asked: list[tuple[float | None, str | None]] = []
    ranks = publisher._policy.ranks
    call = ranks.call

    def watched(method: str, arguments: Any, **named: Any) -> Any:
        if method == "send_weights":
            asked.append((named["timeout_s"], named["key"]))
        return call(method, arguments, **named)

    monkeypatch.setattr(ranks, "call", watched)
    for version in (1, 2):
        publisher.publish(version)
    first, (seconds, key) = asked
    nbytes = sum(weight.nbytes for _, weight in policy.disk_weights())
    assert first == (None, None) and seconds is not None and key is not None and seconds > 1e-6
    assert key.startswith(f"rollout.update_timeout_s, 1e-06: {nbytes / 1e6:.1f} MB at ")


def test_a_role_that_does_not_make_room_for_an_update_is_named_itself(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The policy is not to blame, nor the way that weights take."""
    publisher, _, _ = make(policy)
    failure = DeadRankError("critic", 1, "go_to", "its process died")

    def fail(*_: Any) -> None:
        raise failure

    monkeypatch.setattr(publisher._policy, "connect_engines", fail)
    with pytest.raises(GroupError) as caught:
        publisher.publish(1)
    assert caught.value is failure, caught.value


class TwoRanks:
    """Two ranks of a policy, which say how they compute log-probs and publish nothing."""

    role, size = "policy", 2

    def __init__(self, *records: Execution) -> None:
        self.records = list(records)

    def call(self, method: str, arguments: Any, **_: Any) -> Pending[list[Any]]:
        published = PublishedWeights(arguments[0][0] if arguments[0] else 0, [], "", execution=self.records[0])
        answers = {
            "execution": self.records,
            "publish_weights": [published, None],
            "send_weights": [(record, Taken(True, 1, 1.0)) for record in self.records],
        }
        return Pending.done(list(answers[method]))


@pytest.mark.parametrize("update", [PolicyGroup.publish_weights, PolicyGroup.send_weights], ids=["by_store", "by_gpus"])
def test_the_ranks_of_a_policy_are_compared_with_every_update(update: Any, project_log: Any) -> None:
    """They were alike at the start; a warning is said once."""
    record = Execution("bf16", "fp32", "processed_logprobs", 1.0, "sdpa", 100)
    ranks = TwoRanks(record, record)
    group = PolicyGroup(ranks)  # type: ignore[arg-type]
    assert group.execution().result() == record
    ranks.records[1] = replace(record, attention="eager")
    for version in (1, 2):
        update(group, version).result()
    assert project_log.getvalue().count("attention is eager in policy rank 1 and sdpa in policy rank 0") == 1
    ranks.records[1] = replace(record, temperature=0.5)
    with pytest.raises(RequestError, match=r"temperature is 0\.5 in policy rank 1 and 1\.0 in policy rank 0"):
        update(group, 3).result()
