"""Every accepted item gets exactly one result or one error; batches keep to the budget; callers are served in turn; what is
not accepted is refused at once; what its caller gave up is never scored.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.errors import ScoringError
from rlhf_ray.rewards.batcher import Batcher, OverloadedError, estimated_tokens
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult

BUDGET = 10


def item(name: int, tokens: int = 1) -> ScoreRequest:
    """An item of so many tokens, each of which is its name."""
    return ScoreRequest(token_ids=(name,) * tokens)


def name_of(request: ScoreRequest) -> int:
    assert request.token_ids is not None
    return request.token_ids[0]


@dataclass
class Model:
    """Returns each item's name as its score, after a few turns of the loop; fails at a batch that holds an item in
    ``poison``; waits for ``open`` where it is given one.
    """

    turns: int = 0
    poison: frozenset[int] = frozenset()
    gate: asyncio.Event | None = None
    batches: list[list[ScoreRequest]] = field(default_factory=list)

    async def __call__(self, requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        self.batches.append(list(requests))
        for _ in range(self.turns):
            await asyncio.sleep(0)
        if self.gate is not None:
            await self.gate.wait()
        if self.poison & {name_of(request) for request in requests}:
            raise ScoringError(f"batch {len(self.batches) - 1} failed")
        return [ScoreResult.of(float(name_of(request)), len(request.token_ids or ())) for request in requests]

    @property
    def names(self) -> list[list[int]]:
        return [[name_of(request) for request in batch] for batch in self.batches]


@dataclass(frozen=True)
class Caller:
    """Comes after ``arrives`` turns of the loop with items of these sizes; goes away after ``leaves`` more."""

    arrives: int
    sizes: tuple[int, ...]
    leaves: int | None


callers = st.lists(
    st.builds(
        Caller,
        arrives=st.integers(0, 8),
        sizes=st.lists(st.integers(1, BUDGET + 3), max_size=6).map(tuple),
        leaves=st.none() | st.integers(0, 8),
    ),
    max_size=6,
)
Outcome = list[ScoreResult] | BaseException


async def play(batcher: Batcher, visits: Sequence[tuple[Caller, list[ScoreRequest]]]) -> list[Outcome]:
    async def visit(caller: Caller, items: list[ScoreRequest]) -> Outcome:
        await turns(caller.arrives)
        asking = asyncio.create_task(batcher.score(items))
        if caller.leaves is not None:
            await turns(caller.leaves)
            asking.cancel()
        try:
            return await asking
        except (ScoringError, OverloadedError, asyncio.CancelledError) as error:
            return error

    return await asyncio.wait_for(asyncio.gather(*(visit(caller, items) for caller, items in visits)), timeout=10)


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


@given(callers=callers, slow=st.integers(0, 4), poison=st.sets(st.integers(0, 40), max_size=3), room=st.integers(1, 40))
def test_every_accepted_item_has_one_result_or_one_error(
    callers: list[Caller], slow: int, poison: set[int], room: int
) -> None:
    numbers = iter(range(1000))
    visits = [(caller, [item(next(numbers), size) for size in caller.sizes]) for caller in callers]

    async def run() -> tuple[Model, Batcher, list[Outcome]]:
        model = Model(turns=slow, poison=frozenset(poison))
        batcher = Batcher(model, max_tokens=BUDGET, max_items=room)
        outcomes = await play(batcher, visits)
        await turns(10 * (slow + 2))
        return model, batcher, outcomes

    model, batcher, outcomes = asyncio.run(run())
    assert batcher.waiting == 0
    for batch in model.batches:
        assert len(batch) == 1 or sum(len(request.token_ids or ()) for request in batch) <= BUDGET
    batch_of = {name: number for number, batch in enumerate(model.names) for name in batch}
    assert max(Counter(chain.from_iterable(model.names)).values(), default=1) == 1, "an item was scored twice"
    failed = {number for number, batch in enumerate(model.names) if poison & set(batch)}
    for (caller, items), outcome in zip(visits, outcomes, strict=True):
        names = [name_of(request) for request in items]
        mine = [batch_of[name] for name in names if name in batch_of]
        assert mine == sorted(mine), "items of one caller are scored in order"
        if isinstance(outcome, list):
            assert [result.raw for result in outcome] == [float(name) for name in names]
            assert not failed & set(mine)
        elif isinstance(outcome, ScoringError):
            assert str(outcome) == f"batch {min(failed & set(mine))} failed", "a failure reached others than its items"
        elif isinstance(outcome, OverloadedError):
            assert not mine, "what is refused is not scored"
        else:
            assert caller.leaves is not None, "nobody else is cancelled"


@given(queues=st.lists(st.lists(st.integers(1, BUDGET), min_size=1, max_size=6), max_size=6))
def test_callers_are_served_in_turn_and_batches_are_full(queues: list[list[int]]) -> None:
    numbers = iter(range(1000))
    visits = [[item(next(numbers), size) for size in sizes] for sizes in queues]
    model = Model()

    async def run() -> None:
        batcher = Batcher(model, max_tokens=BUDGET, max_items=1000)
        await asyncio.gather(*(batcher.score(items) for items in visits))

    asyncio.run(run())
    in_turn = [request for row in zip_longest(*visits) for request in row if request is not None]
    assert list(chain.from_iterable(model.batches)) == in_turn
    for batch, after in zip(model.batches, model.batches[1:], strict=False):
        together = [*batch, after[0]]
        assert sum(len(request.token_ids or ()) for request in together) > BUDGET, "a batch had room for the next item"


def test_what_comes_during_a_forward_is_scored_together_after_it() -> None:
    async def run() -> Model:
        model = Model(gate=asyncio.Event())
        batcher = Batcher(model, max_tokens=BUDGET, max_items=100)
        asking = [asyncio.create_task(batcher.score([item(0)]))]
        await turns(3)
        asking += [asyncio.create_task(batcher.score([item(name)])) for name in range(1, 6)]
        await turns(3)
        model.gate.set()
        await asyncio.gather(*asking)
        return model

    assert asyncio.run(run()).names == [[0], [1, 2, 3, 4, 5]]


def test_overload_is_refused_at_once_and_costs_the_others_nothing() -> None:
    async def run() -> Model:
        model = Model(gate=asyncio.Event())
        batcher = Batcher(model, max_tokens=BUDGET, max_items=3)
        first = asyncio.create_task(batcher.score([item(0)]))
        await turns(3)
        waiting = asyncio.create_task(batcher.score([item(1), item(2), item(3)]))
        await turns(3)
        assert batcher.waiting == 3
        refused = batcher.score([item(4)])
        with pytest.raises(OverloadedError, match="3 items are waiting and the queue holds 3"):
            refused.send(None)  # not a single turn of the loop passes
        model.gate.set()
        assert [result.raw for result in await first + await waiting] == [0.0, 1.0, 2.0, 3.0]
        return model

    assert asyncio.run(run()).names == [[0], [1, 2, 3]]


def test_a_caller_that_went_away_costs_nothing() -> None:
    async def run() -> Model:
        model = Model(gate=asyncio.Event())
        batcher = Batcher(model, max_tokens=BUDGET, max_items=4)
        asking = [asyncio.create_task(batcher.score([item(name), item(10 + name)])) for name in range(2)]
        await turns(3)
        gone = asyncio.create_task(batcher.score([item(name) for name in range(20, 24)]))
        await turns(2)
        assert batcher.waiting == 4
        gone.cancel()
        await turns(2)
        assert batcher.waiting == 0, "its places are free for others at once"
        asking.append(asyncio.create_task(batcher.score([item(30)])))
        await turns(2)
        model.gate.set()
        await asyncio.gather(*asking)
        return model

    assert asyncio.run(run()).names == [[0, 1, 10, 11], [30]]


def test_a_caller_that_goes_away_during_its_forward_leaves_the_others_their_results() -> None:
    async def run() -> list[ScoreResult]:
        model = Model(gate=asyncio.Event())
        batcher = Batcher(model, max_tokens=BUDGET, max_items=4)
        gone, stays = (asyncio.create_task(batcher.score([item(name)])) for name in (0, 1))
        await turns(3)
        gone.cancel()
        await turns(2)
        model.gate.set()
        return await stays

    assert [result.raw for result in asyncio.run(run())] == [1.0]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_another_number_of_results_than_items_is_an_error_for_all(count: int) -> None:
    async def score(requests: Sequence[ScoreRequest]) -> list[ScoreResult]:
        return [ScoreResult.of(0.0)] * count

    batcher = Batcher(score, max_tokens=BUDGET, max_items=4)
    with pytest.raises(ScoringError, match=f"2 items were scored, but {count} results came back"):
        asyncio.run(batcher.score([item(0), item(1)]))


def test_it_goes_on_after_a_failure() -> None:
    async def run() -> list[ScoreResult]:
        model = Model(poison=frozenset({0}))
        batcher = Batcher(model, max_tokens=BUDGET, max_items=4)
        with pytest.raises(ScoringError):
            await batcher.score([item(0)])
        return await batcher.score([item(1)])

    assert [result.raw for result in asyncio.run(run())] == [1.0]


@given(st.lists(st.integers(0, 9), max_size=20).map(tuple))
def test_the_estimate_is_exact_for_ids(token_ids: tuple[int, ...]) -> None:
    assert estimated_tokens(ScoreRequest(token_ids=token_ids)) == max(len(token_ids), 1)


@given(st.text(), st.text())
def test_the_estimate_counts_bytes_of_all_texts_of_an_item(first: str, second: str) -> None:
    pair = ScoreRequest(prompt=first, response=second)
    turns_of = ScoreRequest(messages=({"role": "", "content": first}, {"role": "", "content": second}))
    size = len(first.encode()) + len(second.encode())
    assert estimated_tokens(pair) == estimated_tokens(turns_of) == 1 + size // 3


@pytest.mark.parametrize(
    "tool", [{"x" * 3000: 1}, {"enum": [1] * 1000}, {"enum": [{}] * 1000}], ids=["key", "numbers", "empty"]
)
def test_the_estimate_counts_what_a_template_writes_of_keys_and_numbers(tool: dict[str, Any]) -> None:
    turns = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    assert estimated_tokens(ScoreRequest(messages=turns, tools=(tool,))) >= 1000


def test_requests_of_one_caller_share_its_turn() -> None:
    async def run() -> Model:
        model = Model(gate=asyncio.Event())
        batcher = Batcher(model, max_tokens=4, max_items=100)
        asking = [asyncio.create_task(batcher.score([item(0)], caller="first"))]
        await turns(3)
        asking += [asyncio.create_task(batcher.score([item(name)], caller="many")) for name in range(10, 16)]
        asking += [asyncio.create_task(batcher.score([item(name)], caller="few")) for name in range(20, 22)]
        await turns(3)
        model.gate.set()
        await asyncio.gather(*asking)
        return model

    assert asyncio.run(run()).names == [[0], [10, 20, 11, 21], [12, 13, 14, 15]]


def test_urgent_items_go_first_and_are_not_refused() -> None:
    async def run() -> Model:
        model = Model(gate=asyncio.Event())
        batcher = Batcher(model, max_tokens=3, max_items=4)
        asking = [asyncio.create_task(batcher.score([item(0)]))]
        await turns(3)
        asking += [asyncio.create_task(batcher.score([item(name)])) for name in range(1, 5)]
        await turns(3)
        asking.append(asyncio.create_task(batcher.score([item(name) for name in range(10, 14)], urgent=True)))
        await turns(3)
        assert batcher.waiting == 8
        model.gate.set()
        await asyncio.gather(*asking)
        return model

    assert asyncio.run(run()).names == [[0], [10, 11, 12], [13, 1, 2], [3, 4]]


def test_the_queue_is_bounded_in_tokens_too() -> None:
    async def run() -> None:
        model = Model(gate=asyncio.Event())
        batcher = Batcher(model, max_tokens=BUDGET, max_items=100, max_queue_tokens=8)
        asking = [asyncio.create_task(batcher.score([item(0)]))]
        await turns(3)
        asking.append(asyncio.create_task(batcher.score([item(1, tokens=9)])))
        await turns(3)
        assert batcher.waiting_tokens == 9, "a single request may be over it: it could be sent never else"
        with pytest.raises(OverloadedError, match="about 9 tokens are waiting and the queue holds 8"):
            await batcher.score([item(2)])
        model.gate.set()
        await asyncio.gather(*asking)
        assert (batcher.waiting, batcher.waiting_tokens) == (0, 0)

    asyncio.run(run())


def test_replicas_score_side_by_side() -> None:
    async def run() -> tuple[Model, Model]:
        models = Model(gate=asyncio.Event()), Model(gate=asyncio.Event())
        batcher = Batcher(*models, max_tokens=2, max_items=100)
        asking = [asyncio.create_task(batcher.score([item(name)])) for name in range(4)]
        await turns(5)
        assert [model.names for model in models] == [[[0, 1]], [[2, 3]]]
        for model in models:
            assert model.gate is not None
            model.gate.set()
        assert [result.raw for pending in asking for result in await pending] == [0.0, 1.0, 2.0, 3.0]
        await asyncio.wait_for(batcher.drained(), timeout=5)
        return models

    asyncio.run(run())


def test_what_one_caller_has_waiting_never_costs_another_a_place() -> None:
    async def run() -> None:
        model = Model(gate=asyncio.Event())
        batcher = Batcher(model, max_tokens=1, max_items=8)
        asking = [asyncio.create_task(batcher.score([item(0)], caller="greedy"))]
        await turns(3)
        asking += [asyncio.create_task(batcher.score([item(0)] * 8, caller="greedy"))]
        await turns(3)
        assert batcher.waiting == 8 and batcher.full("greedy") and not batcher.full("other")
        with pytest.raises(OverloadedError):
            await batcher.score([item(1)], caller="greedy")
        asking += [asyncio.create_task(batcher.score([item(1)] * 4, caller="other"))]
        await turns(3)
        assert batcher.waiting == 12
        with pytest.raises(OverloadedError):
            await batcher.score([item(1)], caller="other")
        asking += [asyncio.create_task(batcher.score([item(1)] * 2, caller="third"))]
        await turns(3)
        asking += [asyncio.create_task(batcher.score([item(1)] * 2, caller="fourth"))]
        await turns(3)
        assert batcher.waiting == 16
        with pytest.raises(OverloadedError):
            await batcher.score([item(1)], caller="fifth")
        model.gate.set()
        await asyncio.gather(*asking)

    asyncio.run(run())
