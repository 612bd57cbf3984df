"""An engine that does not compute log-probs as the trainer does is stale, whatever weights it has; others serve meanwhile."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlhf_ray.errors import DeadRankError, GroupError, RequestError
from rlhf_ray.pending import Pending
from rlhf_ray.rollout.errors import EngineDeadError
from rlhf_ray.rollout.execution import Execution
from rlhf_ray.rollout.fleet import Engines, Fleet
from rlhf_ray.rollout.health import EngineState, HealthPolicy
from rlhf_ray.rollout.requests import Probe
from rlhf_ray.rollout.wire import PublishedWeights

from .test_execution import RECORD

POLICY = replace(RECORD, head="fp32", attention="sdpa", vllm=None, top_p=None, top_k=None, min_p=None)
ENGINE = replace(RECORD, deepspeed=None)


class Answering:
    """An engine that takes whatever it is sent and says ``record``."""

    def __init__(self, record: Execution | None = ENGINE) -> None:
        self.record, self.received = record, 0

    def receive(self, weights: Any) -> Pending[Execution | None]:
        self.received += 1
        polls = iter((False, False))
        return Pending(lambda: self.record, lambda timeout_s: next(polls, True))

    def execution(self) -> Pending[Execution | None]:
        return Pending(lambda: self.record)

    def probe(self) -> Pending[Probe]:
        return Pending(lambda: Probe(None, 0, 0))

    def generate(self, requests: Any, deadline_s: float) -> Pending[Any]:
        raise EngineDeadError("rollout", 0, "generate", "killed")


def published(version: int, policy: Execution | None = POLICY) -> PublishedWeights:
    return PublishedWeights(version, (), "sum", execution=policy)


def by_store(fleet: Fleet, version: int, policy: Execution = POLICY) -> None:
    fleet.update_weights(version, published(version, policy))


def by_gpus(fleet: Fleet, version: int, policy: Execution = POLICY) -> None:
    fleet.update_by(version, lambda engines: policy)


WAYS = pytest.mark.parametrize("update", [by_store, by_gpus])


@WAYS
def test_an_engine_that_differs_after_an_update_is_stale_until_it_agrees_again(update: Any, project_log: Any) -> None:
    handles = [Answering(), Answering(), Answering()]
    fleet = Fleet(Engines(handles, restart=lambda engine, incarnation: Pending(lambda: None)))  # nothing dies
    update(fleet, 1)
    assert fleet.health.healthy == (0, 1, 2)
    handles[1].record = replace(ENGINE, temperature=1.0)
    update(fleet, 2)
    assert fleet.health.healthy == (0, 2) and fleet.health[1].state is EngineState.STALE
    assert "temperature is 1.0 in the engine and 0.7 in the policy" in fleet.health[1].cause
    assert project_log.getvalue().count("engine 1 took weight version 2 and may not serve") == 1
    sent = handles[1].received
    for _ in range(3):
        fleet.heal()
    assert handles[1].received == sent, "the same weights again would change nothing"
    handles[1].record = ENGINE
    update(fleet, 3)
    assert fleet.health.healthy == (0, 1, 2)


@WAYS
def test_an_engine_that_changed_what_the_policy_does_not_have_differs_from_the_others(update: Any) -> None:
    handles = [Answering(), Answering()]
    fleet = Fleet(Engines(handles))
    update(fleet, 1)
    handles[0].record = replace(ENGINE, vllm="0.33")
    update(fleet, 2)
    assert fleet.health.healthy == (1,)
    assert "vllm is 0.33 in the engine and 0.32 in engine 0" in fleet.health[0].cause, "by its own record of before"


@WAYS
def test_a_trainer_that_changed_leaves_no_engine_and_the_error_names_the_field(update: Any) -> None:
    fleet = Fleet(Engines([Answering(), Answering()]))
    update(fleet, 1)
    with pytest.raises(
        GroupError, match=r"no engine has the weights[\s\S]*torch is 2\.13 in the engine[\s\S]*and 2\.14 in the policy"
    ):
        update(fleet, 2, replace(POLICY, torch="2.14"))


def test_an_engine_that_says_nothing_may_not_serve_where_the_trainer_does() -> None:
    fleet = Fleet(Engines([Answering(), Answering(None)]))
    by_store(fleet, 1)
    assert fleet.health.healthy == (0,)
    assert fleet.health[1].cause == "it does not say how it computes log-probs"
    fleet.update_weights(2, published(2, None))
    assert fleet.health.healthy == (0, 1), "of a publication without a record nothing is compared"


def test_an_engine_that_is_restarted_with_another_library_does_not_serve() -> None:
    handles = [Answering(), Answering()]

    def restart(engine: int, incarnation: int) -> Pending[None]:
        handles[engine].record = replace(ENGINE, vllm="0.33")
        return Pending(lambda: None)

    fleet = Fleet(Engines(handles, restart=restart, policy=HealthPolicy(backoff_s=0.0)))
    by_store(fleet, 1)
    fleet.health.died(1, "killed", 0)
    for _ in range(6):
        fleet.heal()
    assert fleet.health.healthy == (0,) and fleet.health[1].incarnation == 1
    assert "vllm is 0.33 in the engine and 0.32 in engine 0" in fleet.health[1].cause


def test_what_may_differ_is_said_once_and_serves(project_log: Any) -> None:
    handles = [
        Answering(replace(ENGINE, dtype="fp32")),
        Answering(replace(ENGINE, dtype="fp32", attention="FLASH_ATTN")),
    ]
    fleet = Fleet(Engines(handles))
    assert fleet.require_agreement(POLICY) == handles[0].record
    by_store(fleet, 1)
    by_store(fleet, 2)
    assert fleet.health.healthy == (0, 1)
    said = project_log.getvalue()
    assert said.count("dtype is fp32 in the engine and bf16 in the policy") == 1
    assert said.count("attention is FLASH_ATTN in the engine and CPU_ATTN in engine 0") == 1


def test_at_the_start_an_engine_that_differs_is_an_error() -> None:
    fleet = Fleet(Engines([Answering(), Answering(replace(ENGINE, tokenizer="2e"))]))
    with pytest.raises(
        RequestError, match=r"rollout engine 1: .* tokenizer is 2e in the engine and 1f in the policy: put the"
    ):
        fleet.require_agreement(POLICY)


def test_at_the_start_an_engine_that_has_died_is_left_to_its_restart_and_the_others_are_asked() -> None:
    class Dead(Answering):
        def execution(self) -> Pending[Execution | None]:
            raise DeadRankError("rollout", 0, "execution", "killed")

    fleet = Fleet(Engines([Dead(), Answering()]))
    assert fleet.require_agreement(POLICY) == Answering().record
    assert fleet.health.counts()["dead"] == 1
    with pytest.raises(DeadRankError):
        Fleet(Engines([Dead()])).require_agreement(POLICY)
