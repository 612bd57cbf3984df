"""The batch has the same bits whoever generated what; only healthy engines serve; a lost share is generated whole again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.errors import DeadlineError, GroupError, RequestError
from rlhf_ray.pending import Pending
from rlhf_ray.rollout.engine import RolloutEngine
from rlhf_ray.rollout.errors import EngineDeadError, TooSlowError
from rlhf_ray.rollout.fleet import Fleet, cut_shares
from rlhf_ray.rollout.health import EngineState, HealthPolicy
from rlhf_ray.rollout.requests import Generation, GenerationRequest, make_requests
from rlhf_ray.rollout.transformers_engine import TransformersEngine
from rlhf_ray.rollout.wire import PublishedWeights, publish
from rlhf_ray.trajectories.batch import TrajectoryBatch

DEADLINE_S = 60.0
Fault = Callable[[list[Generation]], list[Generation]]


class LocalHandle:
    """An engine in this process: a call runs when its result is read."""

    def __init__(self, engine: RolloutEngine) -> None:
        self.engine = engine

    def generate(self, requests: Sequence[GenerationRequest], deadline_s: float) -> Pending[list[Generation]]:
        return Pending(lambda: self.engine.generate(requests, deadline_s))

    def receive(self, weights: Any) -> Pending[None]:
        return Pending(lambda: self.engine.receive(weights))

    def probe(self) -> Pending[Any]:
        return Pending(self.engine.probe)


class Handle(LocalHandle):
    """An engine that notes its requests and fails as planned: one fault a call, in order."""

    def __init__(self, engine: TransformersEngine, *faults: Exception | Fault | None) -> None:
        super().__init__(engine)
        self.faults = list(faults)
        self.shares: list[tuple[GenerationRequest, ...]] = []
        self.answers_probes = True
        self.takes_weights = True

    def generate(self, requests: Sequence[GenerationRequest], deadline_s: float) -> Pending[list[Generation]]:
        self.shares.append(tuple(requests))
        fault = self.faults.pop(0) if self.faults else None
        pending = super().generate(requests, deadline_s)
        if isinstance(fault, Exception):
            return pending.then(lambda _: _raise(fault))
        return pending.then(fault) if fault else pending

    def receive(self, weights: Any) -> Pending[None]:
        if not self.takes_weights:
            return Pending(lambda: _raise(DeadlineError("rollout", 0, "receive", "no answer in 60 s")))
        return super().receive(weights)

    def probe(self) -> Pending[Any]:
        if not self.answers_probes:
            raise GroupError("rollout", 0, "probe", "the actor is gone")
        return super().probe()


def _raise(error: Exception) -> Any:
    raise error


@pytest.fixture(scope="module")
def model_and_directory(save_llama: Any) -> tuple[LlamaForCausalLM, Path]:
    return save_llama(0)


@pytest.fixture(scope="module")
def weights(model_and_directory: tuple[LlamaForCausalLM, Path]) -> PublishedWeights:
    return publish(1, model_and_directory[0].named_parameters())


@pytest.fixture
def make_handle(model_and_directory: tuple[LlamaForCausalLM, Path]) -> Callable[..., Handle]:
    def make(*faults: Exception | Fault | None) -> Handle:
        config = RolloutConfig(backend="transformers", dtype="fp32")
        return Handle(
            TransformersEngine(model_and_directory[1], config, stop_token_ids=(1,), deterministic=True), *faults
        )

    return make


PROMPTS = [(100 + index, [3 + index, 7, 11 + index][: 1 + index % 3]) for index in range(7)]
REQUESTS = make_requests(PROMPTS, samples_per_prompt=2, max_new_tokens=6, run_seed=5, step=2)


@pytest.fixture(scope="module")
def expected(model_and_directory: tuple[LlamaForCausalLM, Path], weights: PublishedWeights) -> TrajectoryBatch:
    """The batch of an undisturbed fleet of three."""
    config = RolloutConfig(backend="transformers", dtype="fp32")
    handles = [
        LocalHandle(TransformersEngine(model_and_directory[1], config, stop_token_ids=(1,), deterministic=True))
        for _ in range(3)
    ]
    fleet = Fleet(handles)
    fleet.update_weights(1, weights)
    return fleet.generate(REQUESTS, DEADLINE_S)


def assert_same_bits(batch: TrajectoryBatch, expected: TrajectoryBatch) -> None:
    assert batch.columns == expected.columns
    assert torch.equal(batch.offsets, expected.offsets)
    for name in batch.columns:
        assert torch.equal(batch[name], expected[name]), name


@given(st.lists(st.integers(1, 4), max_size=12), st.integers(1, 5))
def test_shares_are_even_cuts_between_prompts_in_order(samples: list[int], places: int) -> None:
    requests = [GenerationRequest(p, s, (1,), None, 1) for p, count in enumerate(samples) for s in range(count)]
    shares = cut_shares(requests, places)
    assert [request for share in shares for request in share] == requests
    prompts = [{request.prompt_id for request in share} for share in shares]
    assert len(shares) == places
    assert sum(map(len, prompts)) == len(samples)
    assert max(map(len, prompts)) - min(map(len, prompts)) <= 1


def test_the_batch_is_in_input_order_with_the_published_version(expected: TrajectoryBatch) -> None:
    assert list(zip(expected["prompt_id"].tolist(), expected["sample_index"].tolist(), strict=True)) == [
        request.key for request in REQUESTS
    ]
    for row, request in enumerate(REQUESTS):
        one = expected.select([row])
        assert tuple(one["token_ids"][~one["action_mask"]].tolist()) == request.token_ids
    assert set(expected["weight_version"][expected["action_mask"]].tolist()) == {1}
    assert len(set(map(tuple, (expected.select([row])["token_ids"].tolist() for row in range(14))))) == 14


FAULTS: dict[str, Exception | Fault] = {
    "dead": EngineDeadError("rollout", 1, "generate", "killed"),
    "late": DeadlineError("rollout", 1, "generate", "late"),
    "gone": GroupError("rollout", 1, "generate", "the actor is gone"),
    "short": lambda generations: generations[:-1],
    "mixed up": lambda generations: generations[::-1],
    "old weights": lambda generations: [
        Generation(*g.key, g.token_ids, g.log_probs, (0,) * len(g.token_ids), g.finish_reason) for g in generations
    ],
}
AFTERWARDS = {"late": EngineState.SUSPECT, "gone": EngineState.SUSPECT, "old weights": EngineState.STALE}


@pytest.mark.parametrize("fault", list(FAULTS))
@pytest.mark.parametrize("victim", [0, 2])
def test_a_lost_share_is_generated_again_as_a_whole_with_the_same_bits(
    fault: str, victim: int, make_handle: Any, weights: PublishedWeights, expected: TrajectoryBatch
) -> None:
    handles = [make_handle(*([FAULTS[fault]] if place == victim else [])) for place in range(3)]
    fleet = Fleet(handles)
    fleet.update_weights(1, weights)
    handles[victim].answers_probes = False
    assert_same_bits(fleet.generate(REQUESTS, DEADLINE_S), expected)
    assert fleet.health[victim].state is AFTERWARDS.get(fault, EngineState.DEAD)
    shares = [tuple(share) for share in cut_shares(REQUESTS, 3)]
    requested = [share for handle in handles for share in handle.shares]
    assert sorted(requested, key=shares.index) == sorted([*shares, shares[victim]], key=shares.index)
    assert_same_bits(fleet.generate(REQUESTS, DEADLINE_S), expected)  # from the start on two engines
    assert len(handles[victim].shares) == 1


def test_one_engine_left_does_the_work_of_three(
    make_handle: Any, weights: PublishedWeights, expected: TrajectoryBatch
) -> None:
    fleet = Fleet([make_handle() for _ in range(3)])
    fleet.update_weights(1, weights)
    fleet.health.died(0, "x")
    fleet.health.retire(1, "x")
    assert_same_bits(fleet.generate(REQUESTS, DEADLINE_S), expected)


def test_a_suspect_serves_again_only_after_it_answered(
    make_handle: Any, weights: PublishedWeights, expected: TrajectoryBatch
) -> None:
    handle = make_handle(DeadlineError("rollout", 0, "generate", "late"))
    fleet = Fleet([handle])
    fleet.update_weights(1, weights)
    batch = fleet.generate(REQUESTS, DEADLINE_S)  # late, then a good probe, then the share again
    assert torch.equal(batch["prompt_id"], expected["prompt_id"])
    assert fleet.health.healthy == (0,)
    handle.faults = [DeadlineError("rollout", 0, "generate", "late")]
    handle.answers_probes = False
    with pytest.raises(GroupError, match="no engine is healthy"):
        fleet.generate(REQUESTS, DEADLINE_S)


def test_nothing_is_served_before_the_first_update(make_handle: Any, weights: PublishedWeights) -> None:
    handle = make_handle()
    fleet = Fleet([handle])
    with pytest.raises(GroupError, match="no engine is healthy"):
        fleet.generate(REQUESTS, DEADLINE_S)
    fleet.update_weights(1, weights)
    assert len(fleet.generate([], DEADLINE_S)) == 0
    assert handle.shares == []


def test_a_share_that_fails_everywhere_ends_in_one_error(make_handle: Any, weights: PublishedWeights) -> None:
    late = DeadlineError("rollout", 0, "generate", "late")
    fleet = Fleet([make_handle(*[late] * 9) for _ in range(2)], policy=HealthPolicy(failures_until_dead=99))
    fleet.update_weights(1, weights)
    with pytest.raises(GroupError, match="share 0 failed 3 times, last: rollout rank 0 failed in generate: late"):
        fleet.generate(REQUESTS, DEADLINE_S)


def test_a_wrong_request_is_nobodys_fault(make_handle: Any, weights: PublishedWeights) -> None:
    fleet = Fleet([make_handle(), make_handle()])
    fleet.update_weights(1, weights)
    with pytest.raises(RequestError, match="has no seed"):
        fleet.generate(make_requests(PROMPTS, samples_per_prompt=1, max_new_tokens=2), DEADLINE_S)
    assert fleet.health.healthy == (0, 1)


def test_an_engine_that_missed_an_update_never_serves(
    make_handle: Any, weights: PublishedWeights, expected: TrajectoryBatch
) -> None:
    handles = [make_handle() for _ in range(3)]
    fleet = Fleet(handles)
    fleet.update_weights(1, weights)
    handles[1].takes_weights = False
    fleet.update_weights(2, PublishedWeights(2, weights.buckets, weights.checksum))
    assert fleet.health[1].state is EngineState.DEAD
    batch = fleet.generate(REQUESTS, DEADLINE_S)
    assert set(batch["weight_version"][batch["action_mask"]].tolist()) == {2}
    assert torch.equal(batch["rollout_log_probs"], expected["rollout_log_probs"])
    assert handles[1].shares == []


def test_a_restarted_engine_is_stale_until_it_alone_was_updated(make_handle: Any, weights: PublishedWeights) -> None:
    handles = [make_handle(), make_handle()]
    fleet = Fleet(handles)
    fleet.update_weights(1, weights)
    fleet.health.died(1, "crash")
    fleet.health.restart(1)
    handles[1].engine = make_handle().engine
    fleet.health.started(1)
    fleet.probe()
    fleet.generate(REQUESTS, DEADLINE_S)
    assert (fleet.health[1].state, handles[1].shares) == (EngineState.STALE, [])
    handles[0].takes_weights = False  # must not be asked: it has this version
    fleet.update_weights(1, weights)
    assert fleet.health.healthy == (0, 1)
    fleet.generate(REQUESTS, DEADLINE_S)
    assert len(handles[1].shares) == 1


def test_no_engine_with_weights_is_an_error_that_says_why(make_handle: Any, weights: PublishedWeights) -> None:
    fleet = Fleet([make_handle()])
    broken = PublishedWeights(1, (*weights.buckets[:-1], weights.buckets[-1][:-1]), weights.checksum)
    with pytest.raises(GroupError, match=r"no engine has the weights[\s\S]*dead[\s\S]*did not come"):
        fleet.update_weights(1, broken)


def test_a_probe_finds_the_dead(make_handle: Any, weights: PublishedWeights) -> None:
    handles = [make_handle(), make_handle()]
    fleet = Fleet(handles)
    fleet.update_weights(1, weights)
    handles[0].engine.shutdown()
    fleet.probe()
    assert (fleet.health[0].state, fleet.health[0].cause) == (EngineState.DEAD, "it was shut down")
    assert fleet.health.healthy == (1,)


SLOW = TooSlowError("rollout", 0, "generate", "31 of 32 requests were unfinished")


def test_a_share_that_took_too_long_is_not_tried_again_where_none_was_in_time(
    make_handle: Callable[..., Handle], weights: PublishedWeights
) -> None:
    handles = [make_handle(SLOW), make_handle(SLOW)]
    fleet = Fleet(handles)
    fleet.update_weights(1, weights)
    with pytest.raises(GroupError) as caught:
        fleet.generate(REQUESTS, DEADLINE_S)
    assert [len(handle.shares) for handle in handles] == [1, 1], "nobody is asked to take as long again"
    assert caught.value is SLOW


def test_a_share_that_took_too_long_is_tried_again_where_another_was_in_time(
    make_handle: Callable[..., Handle], weights: PublishedWeights, expected: TrajectoryBatch, project_log: StringIO
) -> None:
    fleet = Fleet([make_handle(), make_handle(SLOW), make_handle()])
    fleet.update_weights(1, weights)
    assert_same_bits(fleet.generate(REQUESTS, DEADLINE_S), expected)
    assert "engine 1 lost share 1, which is generated again: rollout rank 0 failed in generate: 31 of 32" in (
        project_log.getvalue()
    )
