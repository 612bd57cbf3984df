"""Both engines keep the same promises, measured against plain forwards of the same weights. One process, real vLLM."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.errors import RequestError
from rlhf_ray.rollout.engine import RolloutEngine
from rlhf_ray.rollout.errors import EngineDeadError, TooSlowError, WeightUpdateError
from rlhf_ray.rollout.requests import Generation, GenerationRequest, Probe, make_requests
from rlhf_ray.rollout.transformers_engine import TransformersEngine
from rlhf_ray.rollout.vllm_engine import VllmEngine
from rlhf_ray.rollout.wire import publish
from rlhf_ray.trajectories.columns import FinishReason

from .llamas import EOS, VOCABULARY, largest_difference, make_llama, reference_log_probs, weights_of

TEMPERATURE = 0.7
TOLERANCE = 1e-4
"""The bar on trainer against rollout log-probs in fp32; other weights are thousands of times further away."""
pytestmark = pytest.mark.vllm
BACKENDS: dict[str, type[RolloutEngine]] = {"transformers": TransformersEngine, "vllm": VllmEngine}
DEADLINE_S = 120.0
STOPS = (EOS, VOCABULARY - 1)
"""Two tokens that end an answer."""


class Clock:
    """Each look at it takes ``seconds``."""

    def __init__(self) -> None:
        self.now, self.seconds = 0.0, 0.0

    def __call__(self) -> float:
        self.now += self.seconds
        return self.now


class Bench:
    """One engine that is made when needed: again after a test has killed it. vLLM allows one a process."""

    def __init__(self, backend: type[RolloutEngine], directory: Path, **settings: Any) -> None:
        self.clock = Clock()
        self._engine: RolloutEngine | None = None
        config = RolloutConfig(dtype="fp32", temperature=TEMPERATURE, kv_cache_gib=0.1, max_model_tokens=256)
        self._make: Callable[[], RolloutEngine] = lambda: backend(
            directory, config, stop_token_ids=STOPS, clock=self.clock, **settings
        )

    def engine(self) -> RolloutEngine:
        """Alive and idle."""
        self.clock.seconds = 0.0
        if self._engine is None or self._engine.probe().dead is not None:
            self.close()
            self._engine = self._make()
        assert self._engine.unfinished == 0
        return self._engine

    def close(self) -> None:
        if self._engine is not None:
            self._engine.shutdown()


@pytest.fixture(scope="module")
def models() -> dict[int, LlamaForCausalLM]:
    """Weights by version; tied, so that the head is not on disk."""
    return {version: make_llama(version, tied=True) for version in range(4)}


@pytest.fixture(scope="module", params=list(BACKENDS))
def bench(
    request: pytest.FixtureRequest, models: dict[int, LlamaForCausalLM], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Bench]:
    directory = tmp_path_factory.mktemp("tied")
    models[0].save_pretrained(directory)
    bench = Bench(BACKENDS[request.param], directory, deterministic=True)
    yield bench
    bench.close()


def update(engine: RolloutEngine, models: dict[int, LlamaForCausalLM], version: int, bucket_bytes: int = 2**20) -> None:
    engine.receive(publish(version, weights_of(models[version]), bucket_bytes=bucket_bytes))


def requests_of(count: int, *, max_new_tokens: int = 12, samples: int = 2, seed: int = 0) -> list[GenerationRequest]:
    generator = torch.Generator().manual_seed(seed)
    prompts = [
        (row, torch.randint(2, VOCABULARY, (1 + row * 3 % 11,), generator=generator).tolist()) for row in range(count)
    ]
    return make_requests(prompts, samples_per_prompt=samples, max_new_tokens=max_new_tokens, run_seed=seed)


def test_log_probs_are_the_trainers_before_and_after_each_update(
    bench: Bench, models: dict[int, LlamaForCausalLM]
) -> None:
    engine, requests = bench.engine(), requests_of(12)
    seen = []
    for version in (0, 1, 2, 0):
        if version != engine.weight_version:
            update(engine, models, version, bucket_bytes=(10_000, 2**30)[version % 2])
        generations = engine.generate(requests, DEADLINE_S)
        assert largest_difference(models[version], requests, generations, TEMPERATURE) < TOLERANCE
        assert largest_difference(models[(version + 1) % 3], requests, generations, TEMPERATURE) > 1.0
        assert {v for generation in generations for v in generation.weight_versions} == {version}
        seen.append(generations)
    assert engine.weight_version == 0
    assert [g.token_ids for g in seen[0]] == [g.token_ids for g in seen[3]]
    assert [g.token_ids for g in seen[0]] != [g.token_ids for g in seen[1]]


def test_the_same_call_gives_the_same_bits_run_after_run(bench: Bench, models: dict[int, LlamaForCausalLM]) -> None:
    engine, requests = bench.engine(), requests_of(16, max_new_tokens=20)
    first = engine.generate(requests, DEADLINE_S)
    engine.generate(requests_of(5, seed=1), DEADLINE_S)
    assert engine.generate(requests, DEADLINE_S) == first
    update(engine, models, 3)
    other = engine.generate(requests, DEADLINE_S)
    update(engine, models, first[0].weight_versions[0])
    assert engine.generate(requests, DEADLINE_S) == first != other
    assert len({generation.token_ids for generation in first}) == len(first)


def test_answers_end_with_the_stop_token_or_at_the_limit(bench: Bench) -> None:
    engine, requests = bench.engine(), requests_of(40, max_new_tokens=15)
    generations = engine.generate(requests, DEADLINE_S)
    assert [generation.key for generation in generations] == [request.key for request in requests]
    for generation in generations:
        *before, last = generation.token_ids
        assert not set(before) & set(STOPS)
        if generation.finish_reason is FinishReason.STOP:
            assert last in STOPS
        else:
            assert generation.finish_reason is FinishReason.LENGTH
            assert last not in STOPS
            assert len(generation.token_ids) == 15
        assert len(generation.token_ids) == len(generation.log_probs) == len(generation.weight_versions)
    assert {generation.finish_reason for generation in generations} == {FinishReason.STOP, FinishReason.LENGTH}
    for stop in STOPS:
        assert any(len(generation.token_ids) > 1 for generation in generations if stop in generation.token_ids)


def test_a_stop_token_at_the_limit_is_a_stop(bench: Bench) -> None:
    engine, draws = bench.engine(), make_requests([(0, [5])], samples_per_prompt=400, max_new_tokens=1, run_seed=0)
    for generation in engine.generate(draws, DEADLINE_S):
        ends = generation.token_ids[0] in STOPS
        assert generation.finish_reason is (FinishReason.STOP if ends else FinishReason.LENGTH)


@torch.no_grad()
def test_greedy_answers_take_the_likeliest_token_each_time_beside_sampled_ones(
    bench: Bench, models: dict[int, LlamaForCausalLM]
) -> None:
    engine = bench.engine()
    if engine.weight_version != 0:
        update(engine, models, 0)
    drawn = requests_of(6)
    greedy = [replace(request, sample_index=9 + request.sample_index, greedy=True) for request in drawn]
    mixed = engine.generate([*drawn, *greedy], DEADLINE_S)
    assert engine.generate(drawn, DEADLINE_S) == mixed[: len(drawn)], "greedy neighbours change no draw"
    for request, generation in zip(greedy, mixed[len(drawn) :], strict=True):
        context = list(request.token_ids)
        for token in generation.token_ids:
            logits = models[0](input_ids=torch.tensor([context])).logits[0, -1]
            assert token == int(logits.argmax())
            context.append(token)
    assert largest_difference(models[0], greedy, mixed[len(drawn) :], 1.0) < TOLERANCE


@torch.no_grad()
def test_tokens_are_drawn_from_the_distribution_at_the_temperature(
    bench: Bench, models: dict[int, LlamaForCausalLM]
) -> None:
    engine, count = bench.engine(), 3000
    update(engine, models, 0)
    requests = make_requests([(0, [5, 9])], samples_per_prompt=count, max_new_tokens=1, run_seed=1)
    drawn = torch.tensor([generation.token_ids[0] for generation in engine.generate(requests, DEADLINE_S)])
    logits = models[0](input_ids=torch.tensor([[5, 9]])).logits[0, -1]
    frequencies = torch.bincount(drawn, minlength=VOCABULARY) / count

    def worst(temperature: float) -> float:
        """Largest deviation in standard errors over the tokens that come often enough to judge."""
        p = torch.softmax(logits / temperature, dim=-1)
        often = p * count > 20
        return float(((frequencies - p) / (p * (1 - p) / count).sqrt())[often].abs().max())

    assert worst(TEMPERATURE) < 4.5
    assert worst(1.0) > 6.0


def test_a_late_call_is_dropped_whole_and_leaves_no_trace(bench: Bench) -> None:
    engine, requests = bench.engine(), requests_of(6)
    before = engine.generate(requests, DEADLINE_S)
    bench.clock.seconds = 1.0
    with pytest.raises(TooSlowError) as caught:
        engine.generate(requests, 4.0)
    text = str(caught.value)
    pattern = r"(\d+) of 12 requests .* after 4 s \(rollout.timeout_s\) .* (\S+) tokens/s .* about (\d+) s\."
    told = re.search(pattern, text)
    assert told is not None, text
    rate, needed = float(told[2]), float(told[3])
    assert int(told[1]) / 4 <= rate <= 3 * 12 / 4, "three steps of at most 12 tokens in 4 s"
    assert 4.0 < needed <= sum(request.max_new_tokens for request in requests) / rate + 1
    assert "Raise rollout.timeout_s to that" in text
    assert engine.unfinished == 0
    assert engine.step() == []
    assert bench.engine().generate(requests, DEADLINE_S) == before


def test_all_requests_are_added_or_none(bench: Bench) -> None:
    engine, requests = bench.engine(), requests_of(3)
    bad = GenerationRequest(9, 0, (VOCABULARY,), 0, 4)
    with pytest.raises(RequestError, match=f"token {VOCABULARY} is not in the model's vocabulary of {VOCABULARY}"):
        engine.submit([*requests, bad])
    with pytest.raises(RequestError, match=r"rollout\.max_model_tokens"):
        engine.submit([*requests, GenerationRequest(9, 0, (2,) * 250, 0, 7)])
    assert engine.unfinished == 0
    engine.submit(requests[:2])
    with pytest.raises(RequestError, match="asked for twice"):
        engine.submit(requests[1:])
    with pytest.raises(RequestError, match="has 2 requests in work"):
        engine.generate(requests[2:], DEADLINE_S)
    assert engine.abort() == 2
    assert engine.generate([], DEADLINE_S) == []


def test_an_update_between_two_steps_splits_the_versions_there(
    bench: Bench, models: dict[int, LlamaForCausalLM]
) -> None:
    engine, requests = bench.engine(), requests_of(8)
    update(engine, models, 0)
    engine.submit(requests)
    done: list[Generation] = [generation for _ in range(5) for generation in engine.step()]
    early = {generation.key for generation in done}
    update(engine, models, 1)
    assert engine.probe() == Probe(None, 1, len(requests) - len(done))
    while engine.unfinished:
        done += engine.step()
    by_key = {generation.key: generation for generation in done}
    assert any(request.key not in early for request in requests)
    for request in requests:
        generation = by_key[request.key]
        split = len(generation.token_ids) if request.key in early else 5
        assert generation.weight_versions == (0,) * split + (1,) * (len(generation.token_ids) - split)
        assert _difference(models[0], request, generation, slice(0, split)) < TOLERANCE
        assert _difference(models[1], request, generation, slice(split, None)) < TOLERANCE


def _difference(model: LlamaForCausalLM, request: GenerationRequest, generation: Generation, part: slice) -> float:
    difference = reference_log_probs(model, request, generation, TEMPERATURE) - torch.tensor(generation.log_probs)
    return max(difference[part].abs().tolist(), default=0.0)


def test_buckets_may_come_one_by_one_but_nothing_happens_in_between(
    bench: Bench, models: dict[int, LlamaForCausalLM]
) -> None:
    engine, requests = bench.engine(), requests_of(3)
    with pytest.raises(RequestError, match="load_bucket outside of a weight update"):
        engine.load_bucket([])
    published = publish(2, weights_of(models[2]), bucket_bytes=30_000)
    engine.begin_update()
    for bucket in published.buckets:
        engine.load_bucket(bucket)
        for call in (lambda: engine.submit(requests), engine.step, engine.begin_update):
            with pytest.raises(RequestError, match="in the middle of a weight update"):
                call()
    engine.finish_update(published.version, published.checksum)
    generations = engine.generate(requests, DEADLINE_S)
    assert largest_difference(models[2], requests, generations, TEMPERATURE) < TOLERANCE


Weights = list[tuple[str, torch.Tensor]]


def _renamed(weights: Weights) -> Weights:
    return [(name.replace("layers.1.mlp.up_proj", "layers.1.mlp.up"), weight) for name, weight in weights]


def _corrupt(weights: Weights) -> Weights:
    name, weight = weights[-1]
    return [*weights[:-1], (name, weight + 1e-3)]


BROKEN: dict[str, tuple[Callable[[Weights], Weights], str]] = {
    "a wrong name": (_renamed, "'model.layers.1.mlp.up.weight' is not the name of a weight"),
    "a corrupt bucket": (_corrupt, "checksum"),
}


@pytest.mark.parametrize("broken", list(BROKEN))
def test_a_failed_update_leaves_the_engine_dead(broken: str, bench: Bench, models: dict[int, LlamaForCausalLM]) -> None:
    engine, requests = bench.engine(), requests_of(3)
    engine.submit(requests)
    change, message = BROKEN[broken]
    good, bad = publish(1, weights_of(models[1])), publish(1, change(weights_of(models[1])))
    with pytest.raises(WeightUpdateError, match=message):
        engine.update_weights(1, bad.buckets, good.checksum)
    assert message.split("'")[-1] in str(engine.probe().dead)
    calls = (lambda: engine.generate(requests, 1.0), engine.step, lambda: engine.receive(good), engine.abort)
    for call in calls:
        with pytest.raises((EngineDeadError, RequestError)) as caught:
            call()
        assert "dead" in str(caught.value) or "in work" in str(caught.value)
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(EngineDeadError, match="is dead"):
        engine.generate(requests, DEADLINE_S)


# Outside of deterministic mode


@pytest.fixture(scope="module", params=list(BACKENDS))
def free_bench(request: pytest.FixtureRequest, save_llama: Any) -> Iterator[tuple[Bench, Sequence[LlamaForCausalLM]]]:
    """Untied weights; no seeds needed; vLLM with its prefix cache."""
    model, directory = save_llama(0)
    bench = Bench(BACKENDS[request.param], directory, seed=3, rank=1)
    yield bench, (model, make_llama(1))
    bench.close()


def test_an_update_reaches_what_was_cached(free_bench: tuple[Bench, Sequence[LlamaForCausalLM]]) -> None:
    engine, models = free_bench[0].engine(), free_bench[1]
    prompt = torch.randint(2, VOCABULARY, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    requests = make_requests([(0, prompt), (1, [*prompt[:150], 7])], samples_per_prompt=4, max_new_tokens=8)
    for version in (0, 1, 0):
        engine.receive(publish(version, models[version].named_parameters()))
        for _ in range(2):
            generations = engine.generate(requests, DEADLINE_S)
            assert largest_difference(models[version], requests, generations, TEMPERATURE) < TOLERANCE
            assert largest_difference(models[1 - version], requests, generations, TEMPERATURE) > 1.0


def test_answers_stay_in_work_from_call_to_call_and_go_on_under_new_weights(
    free_bench: tuple[Bench, Sequence[LlamaForCausalLM]], monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, models = free_bench
    engine = bench.engine()
    engine.receive(publish(0, models[0].named_parameters()))
    requests = make_requests([(row, [3 + row, 4, 5]) for row in range(6)], samples_per_prompt=2, max_new_tokens=9)
    done = [*engine.advance(requests[:8], 0.0), *engine.advance(requests[8:], 0.0)]
    assert engine.unfinished == len(requests) - len(done) > 0
    engine.receive(publish(1, models[1].named_parameters()))
    steps, step = [0], engine.step
    monkeypatch.setattr(engine, "step", lambda: (steps.__setitem__(0, steps[0] + 1), step())[1])
    bench.clock.seconds = 1.0
    done += engine.advance([], 2.5)
    assert steps == [3] and engine.unfinished > 0, "three looks at the clock, and then it came back"
    while engine.unfinished:
        done += engine.advance([], 100.0)
    assert sorted(generation.key for generation in done) == sorted(request.key for request in requests)
    both = 0
    for generation in done:
        request = next(one for one in requests if one.key == generation.key)
        split = generation.weight_versions.count(0)
        both += 0 < split < len(generation.token_ids)
        assert generation.weight_versions == (0,) * split + (1,) * (len(generation.token_ids) - split)
        assert _difference(models[0], request, generation, slice(0, split)) < TOLERANCE
        assert _difference(models[1], request, generation, slice(split, None)) < TOLERANCE
    assert both >= 4, "answers that were in work at the update"


def test_without_seeds_every_call_draws_anew(free_bench: tuple[Bench, Sequence[LlamaForCausalLM]]) -> None:
    engine = free_bench[0].engine()
    requests = make_requests([(0, [3, 4])], samples_per_prompt=20, max_new_tokens=10)
    first, second = engine.generate(requests, DEADLINE_S), engine.generate(requests, DEADLINE_S)
    assert {generation.token_ids for generation in first} != {generation.token_ids for generation in second}
    assert len({generation.token_ids for generation in first}) > 10


def test_bfloat16_weights_arrive_in_a_bfloat16_engine(save_llama: Any) -> None:
    model, directory = save_llama(0, dtype=torch.bfloat16)
    config = RolloutConfig(dtype="bf16", backend="transformers")
    engine = TransformersEngine(directory, config, stop_token_ids=(EOS,))
    other = make_llama(1).to(torch.bfloat16)
    requests = requests_of(6)
    before = engine.generate(requests, DEADLINE_S)
    engine.receive(publish(1, other.named_parameters()))
    after = engine.generate(requests, DEADLINE_S)
    assert largest_difference(model, requests, before, 1.0) < 0.1
    assert largest_difference(other, requests, after, 1.0) < 0.1
    assert largest_difference(model, requests, after, 1.0) > 1.0
