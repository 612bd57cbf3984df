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
from rlhf_ray.errors import CapacityError, DeadlineError, DeadRankError, GroupError, RequestError
from rlhf_ray.pending import Pending
from rlhf_ray.rollout.engine import RolloutEngine
from rlhf_ray.rollout.errors import EngineDeadError, TooSlowError
from rlhf_ray.rollout.fleet import Engines, Fleet, SetAside, cut_shares
from rlhf_ray.rollout.health import EngineState, HealthPolicy
from rlhf_ray.rollout.requests import Generation, GenerationRequest, make_requests
from rlhf_ray.rollout.transformers_engine import TransformersEngine
from rlhf_ray.rollout.wire import PublishedWeights
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

    def execution(self) -> Pending[Any]:
        return Pending(self.engine.execution)

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
    fleet = Fleet(Engines(handles))
    fleet.update_weights(1, weights)
    return fleet.generate(REQUESTS, DEADLINE_S)


def assert_same_bits(batch: TrajectoryBatch, expected: TrajectoryBatch) -> None:
    assert batch.columns == expected.columns
    assert torch.equal(batch.offsets, expected.offsets)
    for name in batch.columns:
        assert torch.equal(batch[name], expected[name]), name


def assert_same_samples(batch: TrajectoryBatch, expected: TrajectoryBatch) -> None:
    """The same but for the rounding that comes with shares of other sizes."""
    for name in ("token_ids", "prompt_id", "sample_index", "weight_version"):
        assert torch.equal(batch[name], expected[name]), name
    torch.testing.assert_close(batch["rollout_log_probs"], expected["rollout_log_probs"], rtol=0, atol=1e-4)


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
    fleet = Fleet(Engines(handles))
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
    fleet = Fleet(Engines([make_handle() for _ in range(3)]))
    fleet.update_weights(1, weights)
    fleet.health.died(0, "x", 0)
    fleet.health.retire(1, "x")
    assert_same_bits(fleet.generate(REQUESTS, DEADLINE_S), expected)


def test_a_suspect_serves_again_only_after_it_answered(
    make_handle: Any, weights: PublishedWeights, expected: TrajectoryBatch
) -> None:
    handle = make_handle(DeadlineError("rollout", 0, "generate", "late"))
    fleet = Fleet(Engines([handle]))
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
    fleet = Fleet(Engines([handle]))
    with pytest.raises(GroupError, match="no engine is healthy"):
        fleet.generate(REQUESTS, DEADLINE_S)
    fleet.update_weights(1, weights)
    assert len(fleet.generate([], DEADLINE_S)) == 0
    assert handle.shares == []


def test_a_share_that_fails_everywhere_ends_in_one_error(make_handle: Any, weights: PublishedWeights) -> None:
    late = DeadlineError("rollout", 0, "generate", "late")
    fleet = Fleet(Engines([make_handle(*[late] * 9) for _ in range(2)], policy=HealthPolicy(failures_until_dead=99)))
    fleet.update_weights(1, weights)
    with pytest.raises(GroupError, match="share 0 failed 3 times, last: rollout rank 0 failed in generate: late"):
        fleet.generate(REQUESTS, DEADLINE_S)


def test_a_wrong_request_is_nobodys_fault(make_handle: Any, weights: PublishedWeights) -> None:
    fleet = Fleet(Engines([make_handle(), make_handle()]))
    fleet.update_weights(1, weights)
    with pytest.raises(RequestError, match="has no seed"):
        fleet.generate(make_requests(PROMPTS, samples_per_prompt=1, max_new_tokens=2), DEADLINE_S)
    assert fleet.health.healthy == (0, 1)


def test_an_engine_that_missed_an_update_never_serves(
    make_handle: Any, weights: PublishedWeights, expected: TrajectoryBatch
) -> None:
    handles = [make_handle() for _ in range(3)]
    fleet = Fleet(Engines(handles))
    fleet.update_weights(1, weights)
    handles[1].takes_weights = False
    fleet.update_weights(2, PublishedWeights(2, weights.buckets, weights.checksum))
    assert fleet.health[1].state is EngineState.DEAD
    batch = fleet.generate(REQUESTS, DEADLINE_S)
    assert set(batch["weight_version"][batch["action_mask"]].tolist()) == {2}
    assert torch.equal(batch["rollout_log_probs"], expected["rollout_log_probs"])
    assert handles[1].shares == []


class Restarts:
    """Starts engines again, each when the test says that it is up: by default at once."""

    def __init__(self, handles: Sequence[Handle], make: Callable[[], Handle]) -> None:
        self.handles, self.make = handles, make
        self.asked: list[tuple[int, int]] = []
        self.up = True
        self.failure: Exception | None = None

    def __call__(self, engine: int, incarnation: int) -> Pending[None]:
        self.asked.append((engine, incarnation))

        def finish() -> None:
            assert self.up, "the fleet waited for an engine that was not up"
            if self.failure is not None:
                raise self.failure
            self.handles[engine].engine = self.make().engine
            self.handles[engine].answers_probes = True

        return Pending(finish, lambda timeout_s: self.up)


@pytest.fixture
def with_restarts(make_handle: Callable[..., Handle]) -> Callable[..., tuple[Fleet, Restarts]]:
    def start(*handles: Handle, **policy: Any) -> tuple[Fleet, Restarts]:
        restarts = Restarts(handles, make_handle)
        return Fleet(Engines(handles, restart=restarts, policy=HealthPolicy(**policy))), restarts

    return start


DEAD = EngineDeadError("rollout", 1, "generate", "it was killed")
KILLED = DeadRankError("rollout", 1, "generate", "its process died")


@pytest.mark.parametrize("death", [DEAD, KILLED], ids=["dead", "killed"])
def test_an_engine_that_dies_while_it_generates_comes_back_with_the_published_weights(
    death: Exception,
    make_handle: Any,
    with_restarts: Any,
    weights: PublishedWeights,
    expected: TrajectoryBatch,
) -> None:
    handles = [make_handle(), make_handle(death), make_handle()]
    fleet, restarts = with_restarts(*handles)
    fleet.update_weights(1, weights)
    assert_same_bits(fleet.generate(REQUESTS, DEADLINE_S), expected)
    assert restarts.asked == [(1, 1)]
    fleet.heal()
    assert fleet.health.healthy == (0, 1, 2) and fleet.health[1].incarnation == 1
    before = [len(handle.shares) for handle in handles]
    assert_same_bits(fleet.generate(REQUESTS, DEADLINE_S), expected)
    assert [len(handle.shares) for handle in handles] == [count + 1 for count in before], (
        "each does its own share again"
    )


def test_nothing_waits_for_a_restart_while_another_engine_is_healthy(
    make_handle: Any, with_restarts: Any, weights: PublishedWeights, expected: TrajectoryBatch
) -> None:
    handles = [make_handle(), make_handle(DEAD), make_handle()]
    fleet, restarts = with_restarts(*handles)
    fleet.update_weights(1, weights)
    restarts.up = False  # reading the result then fails the test
    assert_same_bits(fleet.generate(REQUESTS, DEADLINE_S), expected)
    fleet.update_weights(2, PublishedWeights(2, weights.buckets, weights.checksum))
    assert fleet.health[1].state is EngineState.RESTARTING and fleet.health.healthy == (0, 2)
    restarts.up = True
    fleet.heal()
    assert fleet.health[1].state is EngineState.HEALTHY and fleet.health[1].weight_version == 2
    batch = fleet.generate(REQUESTS, DEADLINE_S)
    assert set(batch["weight_version"][batch["action_mask"]].tolist()) == {2}
    assert len(handles[1].shares) == 2


def test_an_engine_that_dies_in_an_update_comes_back_with_those_weights(
    make_handle: Any, with_restarts: Any, weights: PublishedWeights
) -> None:
    handles = [make_handle(), make_handle()]
    fleet, restarts = with_restarts(*handles)
    fleet.update_weights(1, weights)
    handles[1].engine.shutdown()  # it refuses the update
    fleet.update_weights(2, PublishedWeights(2, weights.buckets, weights.checksum))
    assert fleet.health.healthy == (0,)
    fleet.heal()
    assert (restarts.asked, fleet.health.healthy, handles[1].engine.weight_version) == ([(1, 1)], (0, 1), 2)


def test_where_all_are_dead_the_fleet_waits_for_a_restart(
    make_handle: Any, with_restarts: Any, weights: PublishedWeights, expected: TrajectoryBatch
) -> None:
    handles = [make_handle(DEAD)]
    fleet, restarts = with_restarts(*handles)
    fleet.update_weights(1, weights)
    assert_same_samples(fleet.generate(REQUESTS, DEADLINE_S), expected)
    handles[0].engine.shutdown()
    fleet.update_weights(2, PublishedWeights(2, weights.buckets, weights.checksum))
    assert fleet.health.healthy == (0,) and restarts.asked == [(0, 1), (0, 2)]


def test_the_wait_for_a_restart_ends_by_its_deadline(
    make_handle: Any, with_restarts: Any, weights: PublishedWeights
) -> None:
    handles = [make_handle(DEAD)]
    fleet, restarts = with_restarts(*handles, restart_s=0.2)
    fleet.update_weights(1, weights)
    restarts.up = False
    with pytest.raises(GroupError, match=r"none came within 0.2 s \(cluster.start_timeout_s\)[\s\S]*restarting for"):
        fleet.generate(REQUESTS, DEADLINE_S)


def test_an_engine_that_cannot_be_restarted_retires_and_the_error_says_why(
    make_handle: Any, with_restarts: Any, weights: PublishedWeights
) -> None:
    fleet, restarts = with_restarts(make_handle(DEAD), max_restarts=2, backoff_s=0.01)
    fleet.update_weights(1, weights)
    restarts.failure = CapacityError("its GPU is gone")
    with pytest.raises(GroupError, match=r"no engine is healthy[\s\S]*retired[\s\S]*its GPU is gone"):
        fleet.generate(REQUESTS, DEADLINE_S)
    assert restarts.asked == [(0, 1), (0, 2)]


def test_without_restarts_a_dead_engine_stays_dead(make_handle: Any, weights: PublishedWeights) -> None:
    fleet = Fleet(Engines([make_handle(), make_handle(DEAD)]))
    fleet.update_weights(1, weights)
    fleet.generate(REQUESTS, DEADLINE_S)
    for _ in range(3):
        fleet.heal()
    assert fleet.health[1].state is EngineState.DEAD


class Slow(Handle):
    """Takes version 1 only when it is told to."""

    taken = True

    def receive(self, weights: Any) -> Pending[None]:
        pending = super().receive(weights)
        return Pending(pending.result, lambda timeout_s: self.taken or weights.version > 1)


def test_weights_that_a_restarted_engine_still_takes_when_others_are_published_count_for_nothing(
    make_handle: Any, with_restarts: Any, weights: PublishedWeights
) -> None:
    handles = [make_handle(), Slow(make_handle().engine, DEAD)]
    fleet, _ = with_restarts(*handles)
    fleet.update_weights(1, weights)
    handles[1].taken = False
    fleet.generate(REQUESTS, DEADLINE_S)
    fleet.heal()
    assert fleet.health[1].state is EngineState.STALE, "it takes version 1"
    fleet.update_weights(2, PublishedWeights(2, weights.buckets, weights.checksum))
    handles[1].taken = True
    fleet.heal()
    assert fleet.health[1].weight_version == 2 and fleet.health.healthy == (0, 1)


def test_no_engine_with_weights_is_an_error_that_says_why(make_handle: Any, weights: PublishedWeights) -> None:
    fleet = Fleet(Engines([make_handle()]))
    broken = PublishedWeights(1, (*weights.buckets[:-1], weights.buckets[-1][:-1]), weights.checksum)
    with pytest.raises(GroupError, match=r"no engine has the weights[\s\S]*dead[\s\S]*did not come"):
        fleet.update_weights(1, broken)


def test_a_probe_finds_the_dead(make_handle: Any, weights: PublishedWeights) -> None:
    handles = [make_handle(), make_handle()]
    fleet = Fleet(Engines(handles))
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
    fleet = Fleet(Engines(handles))
    fleet.update_weights(1, weights)
    with pytest.raises(GroupError) as caught:
        fleet.generate(REQUESTS, DEADLINE_S)
    assert [len(handle.shares) for handle in handles] == [1, 1], "nobody is asked to take as long again"
    assert caught.value is SLOW


def test_a_share_that_took_too_long_is_tried_again_where_another_was_in_time(
    make_handle: Callable[..., Handle], weights: PublishedWeights, expected: TrajectoryBatch, project_log: StringIO
) -> None:
    fleet = Fleet(Engines([make_handle(), make_handle(SLOW), make_handle()]))
    fleet.update_weights(1, weights)
    assert_same_bits(fleet.generate(REQUESTS, DEADLINE_S), expected)
    assert "engine 1 lost share 1, which is generated again: rollout rank 0 failed in generate: 31 of 32" in (
        project_log.getvalue()
    )


POISON = 103


class Dying(Handle):
    """Dies whenever it is given the prompt POISON."""

    deaths = 0

    def generate(self, requests: Sequence[GenerationRequest], deadline_s: float) -> Pending[list[Generation]]:
        if any(request.prompt_id == POISON for request in requests):
            self.faults = [KILLED]
            self.deaths += 1
        return super().generate(requests, deadline_s)


def test_a_prompt_that_kills_three_engines_is_set_aside_and_the_others_are_all_answered(
    make_handle: Any, with_restarts: Any, weights: PublishedWeights, expected: TrajectoryBatch, project_log: StringIO
) -> None:
    handles = [Dying(make_handle().engine) for _ in range(3)]
    fleet, _ = with_restarts(*handles)
    fleet.update_weights(1, weights)
    told: list[SetAside] = []
    fleet.on_set_aside = told.append
    batch = fleet.generate(REQUESTS, DEADLINE_S)
    kept = [row for row, request in enumerate(REQUESTS) if request.prompt_id != POISON]
    assert_same_samples(batch, expected.select(kept))
    assert sum(handle.deaths for handle in handles) == 3
    (aside,) = told
    assert fleet.set_aside == {POISON}
    assert (aside.prompt_id, aside.token_ids, len(aside.causes)) == (POISON, tuple(PROMPTS[3][1]), 3)
    assert fleet.figures() == {"rollout/engines_healthy": 3, "rollout/restarts": 3, "prompts/set_aside": 1}
    assert f"prompt {POISON} is set aside, because three engines died" in project_log.getvalue()
    assert_same_samples(fleet.generate(REQUESTS, DEADLINE_S), expected.select(kept))
    assert sum(handle.deaths for handle in handles) == 3, "no engine is given it again"


def test_two_deaths_at_a_share_set_no_prompt_aside(
    make_handle: Any, with_restarts: Any, weights: PublishedWeights, expected: TrajectoryBatch
) -> None:
    handle = make_handle(KILLED, KILLED)
    fleet, _ = with_restarts(handle)
    fleet.update_weights(1, weights)
    assert_same_samples(fleet.generate(REQUESTS, DEADLINE_S), expected)
    assert [len(share) for share in handle.shares] == [14, 14, *[2] * 7], "whole, whole again, prompt by prompt"
    assert fleet.set_aside == set()


def test_of_nothing_but_killers_nothing_is_left_which_only_a_whole_step_must_not_be(
    make_handle: Any, with_restarts: Any, weights: PublishedWeights
) -> None:
    fleet, _ = with_restarts(Dying(make_handle().engine))
    fleet.update_weights(1, weights)
    poison = [request for request in REQUESTS if request.prompt_id == POISON]
    for _ in range(2):  # also where the prompt was set aside before
        batch = fleet.generate(poison, DEADLINE_S)
        assert len(batch) == 0
        with pytest.raises(GroupError, match=r"each prompt killed 3 engines[\s\S]*engine"):
            fleet.refuse_empty(batch)
    fleet.refuse_empty(fleet.generate(REQUESTS, DEADLINE_S))


@pytest.mark.parametrize("what", ["generate", "wait", "update"])
def test_a_fleet_that_was_stopped_says_so_at_once_and_restarts_nothing(
    what: str, make_handle: Any, with_restarts: Any, weights: PublishedWeights
) -> None:
    handle = make_handle(DEAD)
    fleet, restarts = with_restarts(handle, restart_s=0.2)
    if what != "wait":
        fleet.update_weights(1, weights)
    fleet.health.died(0, "it was killed", 0)
    fleet.stop()
    fleet.heal()
    with pytest.raises(GroupError, match="the engines were stopped, because the run ends"):
        fleet.update_weights(2, weights) if what == "update" else fleet.generate(REQUESTS, DEADLINE_S)
    assert restarts.asked == [] and handle.shares == []


def test_the_death_of_a_process_is_told_once_although_its_last_call_ends_later(
    make_handle: Any, weights: PublishedWeights, project_log: StringIO
) -> None:
    """A restart ends the old process, so what asked whether it lives, or gave it weights, fails after it is known dead."""
    seconds, failed, late = [0.0], [False], DeadlineError("rollout", 0, "health", "no answer in 60 s")
    asked = Pending[Any](lambda: _raise(late), lambda timeout_s: failed[0])
    fleet = Fleet(Engines([make_handle(), make_handle()], lives=lambda engine: asked, clock=lambda: seconds[0]))
    fleet.update_weights(1, weights)
    fleet.heal()
    seconds[0] += 11
    fleet.heal()
    fleet.health.died(0, "it was killed", 0)
    failed[0] = True
    fleet.heal()
    fleet.engines.take(0, 0, 1, asked)
    assert fleet.health[0].cause == "it was killed" and "engine 0" not in project_log.getvalue()
    assert "engine 1 does not answer" in project_log.getvalue(), "its death is news"


class Stopped(Handle):
    """Answers no call until it is started again, as a process that was stopped."""

    stopped = False

    def generate(self, requests: Sequence[GenerationRequest], deadline_s: float) -> Pending[list[Generation]]:
        self.shares.append(tuple(requests))
        return Pending(_killed, lambda timeout_s: False)

    def receive(self, weights: Any) -> Pending[None]:
        return Pending(_killed, lambda timeout_s: False) if self.stopped else super().receive(weights)


def _killed() -> Any:
    raise AssertionError("nobody waits for a process that does not answer")


@pytest.mark.parametrize("at_work", ["generate", "update"])
def test_a_process_that_answers_nothing_while_it_works_is_replaced_long_before_its_deadline(
    at_work: str, make_handle: Any, weights: PublishedWeights, expected: TrajectoryBatch
) -> None:
    handles = [make_handle(), Stopped(make_handle().engine), make_handle()]
    seconds = [0.0]

    def clock() -> float:
        seconds[0] += 0.5
        return seconds[0]

    def restart(engine: int, incarnation: int) -> Pending[None]:
        handles[engine] = fleet.engines.handles[engine] = make_handle()
        return Pending.done(None)

    def lives(engine: int) -> Pending[Any]:
        if getattr(handles[engine], "stopped", False):
            return Pending(lambda: _raise(DeadlineError("rollout", engine, "health", "no answer in 60 s")))
        return Pending.done({})

    fleet = Fleet(Engines(handles, restart=restart, lives=lives, clock=clock))
    fleet.update_weights(1, weights)
    handles[1].stopped = True
    if at_work == "generate":
        assert_same_bits(fleet.generate(REQUESTS, DEADLINE_S), expected)
    else:
        fleet.update_weights(2, PublishedWeights(2, weights.buckets, weights.checksum))
    fleet.heal()
    assert fleet.health.healthy == (0, 1, 2) and fleet.health[1].incarnation == 1
