"""Engines that are kept sampling: real ones, which die, hang, lie or are given new weights while they have answers in work."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModel, LlamaForCausalLM

from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.errors import DeadlineError, DeadRankError, GroupError, ModelLoadError
from rlhf_ray.pending import Pending
from rlhf_ray.rollout.errors import TooSlowError
from rlhf_ray.rollout.fleet import Answered, Engines, Fleet, Pump
from rlhf_ray.rollout.health import EngineState, HealthPolicy
from rlhf_ray.rollout.requests import Generation, GenerationRequest, make_requests
from rlhf_ray.rollout.transformers_engine import TransformersEngine
from rlhf_ray.rollout.wire import PublishedWeights

SAMPLES, NEW_TOKENS, LIMIT_S = 2, 6, 60.0
Fault = Callable[[list[Generation]], list[Generation]]
KILLED = DeadRankError("rollout", 0, "generate", "its process died")
LATE = DeadlineError("rollout", 0, "generate", "ranks [0] did not answer within 90 s")


class Handle:
    """A real engine that samples one token a call, and fails as planned: one fault a call, in order."""

    def __init__(self, make: Callable[[], TransformersEngine], *faults: Exception | Fault | None) -> None:
        self.make, self.engine, self.faults = make, make(), list(faults)
        self.given: list[int] = []
        self.hangs = False

    def advance(
        self, requests: Sequence[GenerationRequest], seconds: float, deadline_s: float
    ) -> Pending[list[Generation]]:
        assert not self.hangs, "an engine that hangs is asked again"
        self.given += sorted({request.prompt_id for request in requests})
        done = self.engine.advance(requests, 0.0)
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, Exception):
            self.hangs = isinstance(fault, DeadlineError)
            return Pending(lambda: _raise(fault))
        return Pending.done(fault(done) if fault else done)

    def generate(self, requests: Sequence[GenerationRequest], deadline_s: float) -> Pending[list[Generation]]:
        return Pending(lambda: self.engine.generate(requests, deadline_s))

    def receive(self, weights: PublishedWeights) -> Pending[None]:
        return Pending(lambda: self.engine.receive(weights))

    def probe(self) -> Pending[Any]:
        return Pending(self.engine.probe)

    def restart(self) -> Pending[None]:
        self.engine, self.hangs = self.make(), False
        return Pending.done(None)


def _raise(error: Exception) -> Any:
    raise error


@pytest.fixture
def handles(model_and_directory: tuple[LlamaForCausalLM, Path]) -> Callable[..., list[Handle]]:
    config = RolloutConfig(backend="transformers", dtype="fp32")

    def engine() -> TransformersEngine:
        return TransformersEngine(model_and_directory[1], config, stop_token_ids=())

    return lambda *faults: [Handle(engine, *of_one) for of_one in faults]


def fleet_of(handles: Sequence[Handle], weights: PublishedWeights) -> Fleet:
    fleet = Fleet(Engines(handles, restart=lambda engine, incarnation: handles[engine].restart()))
    fleet.update_weights(1, weights)
    return fleet


def give(pump: Pump, *numbers: int) -> None:
    for number in numbers:
        prompt = (number, [3 + number, 7])
        pump.give(number, make_requests([prompt], samples_per_prompt=SAMPLES, max_new_tokens=NEW_TOKENS))


def run(pump: Pump, **options: bool) -> dict[int, Answered]:
    ended: dict[int, Answered] = {}
    for _ in range(200):
        for one in pump.turn(**options):
            assert one.number not in ended
            ended[one.number] = one
        if not pump.working:
            return ended
    raise AssertionError("it stands still")


def versions(ended: dict[int, Answered]) -> set[tuple[int, ...]]:
    return {generation.weight_versions for one in ended.values() for generation in one.generations}


def lying(generations: list[Generation]) -> list[Generation]:
    return [
        Generation(*one.key, one.token_ids, one.log_probs, (0,) * NEW_TOKENS, one.finish_reason) for one in generations
    ]


def renamed(generations: list[Generation]) -> list[Generation]:
    return [Generation(99, 0, (5,), (-1.0,), (1,), generations[0].finish_reason if generations else None)]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "faults",
    [[None, KILLED], [None, LATE], [None, renamed], [None] * (NEW_TOKENS - 1) + [lying]],
    ids=["killed", "hangs", "other samples", "old weights"],
)
def test_an_engine_that_fails_with_answers_in_work_is_replaced_and_they_are_sampled_anew(
    faults: list[Any], handles: Any, weights: PublishedWeights
) -> None:
    both = handles([], faults)
    fleet = fleet_of(both, weights)
    pump = Pump(fleet, timeout_s=LIMIT_S)
    give(pump, 0, 1, 2, 3)
    ended = run(pump)
    assert sorted(ended) == [0, 1, 2, 3]
    assert versions(ended) == {(1,) * NEW_TOKENS}
    assert both[1].given[:2] == [1, 3] and sorted([*both[0].given, *both[1].given]) == [0, 1, 1, 2, 3, 3]
    assert fleet.health[1].incarnation == 1 and fleet.set_aside == set()
    fleet.heal()
    assert fleet.health.healthy == (0, 1)


def test_a_turn_waits_for_an_engine_only_where_none_is_healthy(handles: Any, weights: PublishedWeights) -> None:
    """The first engine dies; it is up again after a few looks at it, which only a turn that waits takes."""
    for others in ([], [[]]):
        both, left = handles([KILLED], *others), [5]

        def coming(timeout_s: float, left: list[int] = left) -> bool:
            left[0] -= 1
            return left[0] < 0

        def restart(engine: int, incarnation: int, both: list[Handle] = both, coming: Any = coming) -> Pending[None]:
            return Pending(both[engine].restart().result, coming)

        fleet = Fleet(Engines(both, restart=restart, policy=HealthPolicy(backoff_s=0.0)))
        fleet.update_weights(1, weights)
        pump = Pump(fleet, timeout_s=LIMIT_S)
        give(pump, 0, 1)
        for _ in range(200):
            if fleet.health[0].state is not EngineState.HEALTHY:
                break
            pump.turn()
        pump.turn()
        assert (0 in fleet.health.healthy) == (not others)


def test_answers_in_work_go_on_under_new_weights_and_a_restarted_engine_has_none_of_before(
    handles: Any, weights: PublishedWeights
) -> None:
    both = handles([], [None, None, KILLED])
    fleet = fleet_of(both, weights)
    pump = Pump(fleet, timeout_s=LIMIT_S)
    give(pump, 0, 1)
    for _ in range(2):
        assert pump.turn() == []
    assert pump.turn(sample=False) == [] and not pump.calling and pump.holding
    fleet.update_weights(2, PublishedWeights(2, weights.buckets, weights.checksum))
    ended = run(pump)
    assert versions({0: ended[0]}) == {(1, 1, 2, 2, 2, 2)}
    assert versions({1: ended[1]}) == {(2,) * NEW_TOKENS}


def test_what_is_in_work_is_finished_and_nothing_begun_where_that_is_asked(
    handles: Any, weights: PublishedWeights
) -> None:
    (handle,) = handles([])
    pump = Pump(fleet_of([handle], weights), timeout_s=LIMIT_S)
    give(pump, 0)
    pump.turn()
    give(pump, 1)
    ended = [one.number for _ in range(10) for one in pump.turn(begin=False)]
    assert ended == [0] and not pump.holding and pump.working and handle.given == [0]
    assert sorted(run(pump)) == [1]


def test_an_engine_that_finishes_nothing_in_time_ends_the_run_and_says_what_to_change(
    handles: Any, weights: PublishedWeights
) -> None:
    pump = Pump(fleet_of(handles([]), weights), timeout_s=0.0)
    give(pump, 0)
    with pytest.raises(TooSlowError, match=r"2 samples in work, and finished none in 0 s \(rollout.timeout_s\)"):
        run(pump)


class Dying(Handle):
    """Dies whenever it has the prompt 2 in work."""

    def advance(self, *arguments: Any) -> Pending[list[Generation]]:
        answer = super().advance(*arguments)
        poisoned = any(request.prompt_id == 2 for request in self.engine._unfinished.values())
        return Pending(lambda: _raise(KILLED)) if poisoned else answer


def test_a_prompt_that_kills_three_engines_is_set_aside_and_given_to_none_again(
    handles: Any, weights: PublishedWeights
) -> None:
    both = [Dying(one.make) for one in handles([], [])]
    fleet, told = fleet_of(both, weights), []
    fleet.on_set_aside = told.append
    pump = Pump(fleet, timeout_s=LIMIT_S)
    give(pump, 0, 1, 2, 3)
    ended = run(pump)
    assert {number: len(one.generations) for number, one in ended.items()} == {0: 2, 1: 2, 2: 0, 3: 2}
    assert fleet.set_aside == {2} and [(aside.prompt_id, len(aside.causes)) for aside in told] == [(2, 3)]
    give(pump, 2)
    assert run(pump)[2].generations == ()
    assert sum(fleet.health[engine].incarnation for engine in range(2)) == 3, "no engine is given it again"


def test_a_stopped_fleet_is_told_at_once(handles: Any, weights: PublishedWeights) -> None:
    fleet = fleet_of(handles([]), weights)
    pump = Pump(fleet, timeout_s=LIMIT_S)
    give(pump, 0)
    fleet.stop()
    with pytest.raises(GroupError, match="the engines were stopped, because the run ends"):
        pump.turn()


def test_an_engine_refuses_weights_that_are_no_whole_language_model(
    model_and_directory: tuple[Any, Path], tmp_path: Path
) -> None:
    """A model without its output layer would sample with one that is drawn at random."""
    _, directory = model_and_directory
    model = AutoModel.from_pretrained(directory)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ModelLoadError, match=r"does not hold the weights of a LlamaForCausalLM \(missing: lm_head.weight"
    ):
        TransformersEngine(tmp_path, RolloutConfig(dtype="fp32", backend="transformers"), stop_token_ids=())
