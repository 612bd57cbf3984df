"""What the prefix cache of vLLM holds is found by requests of the same weights alone, and by short ones too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.rollout.requests import Generation, GenerationRequest, make_requests
from rlhf_ray.rollout.vllm_engine import VllmEngine
from rlhf_ray.rollout.wire import publish

from .llamas import EOS, VOCABULARY, largest_difference, make_llama, reference_log_probs, weights_of

pytestmark = pytest.mark.vllm
DEADLINE_S, TOLERANCE = 60.0, 1e-4
PROMPT = tuple(torch.randint(2, VOCABULARY, (70,), generator=torch.Generator().manual_seed(0)).tolist())
"""Two blocks of 32 tokens and some more."""
Models = tuple[LlamaForCausalLM, LlamaForCausalLM]


@pytest.fixture(scope="module")
def started(save_llama: Any) -> Iterator[tuple[VllmEngine, Models]]:
    model, directory = save_llama(0)
    engine = VllmEngine(
        directory, RolloutConfig(dtype="fp32", kv_cache_gib=0.1, max_model_tokens=256), stop_token_ids=(EOS,)
    )
    yield engine, (model, make_llama(1))
    engine.shutdown()


def ask(prompt_id: int, tokens: int = 6) -> list[GenerationRequest]:
    return make_requests([(prompt_id, PROMPT)], samples_per_prompt=1, max_new_tokens=tokens)


@pytest.fixture
def cached(started: tuple[VllmEngine, Models], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens of each prompt were found in the cache, as vLLM tells with the finished request."""
    engine, counts = started[0]._engine, []
    step = engine.step

    def watched() -> Any:
        outputs = step()
        counts.extend(output.num_cached_tokens for output in outputs if output.finished)
        return outputs

    monkeypatch.setattr(engine, "step", watched)
    return counts


def test_a_request_finds_what_its_weights_computed_and_nothing_of_others(
    started: tuple[VllmEngine, Models], cached: list[int]
) -> None:
    engine, models = started
    for version in (0, 1, 0):  # the last update returns to a version whose blocks still lie there
        engine.receive(publish(version, weights_of(models[version])))
        for _ in range(2):
            requests = ask(0)
            generations = engine.generate(requests, DEADLINE_S)
            assert largest_difference(models[version], requests, generations, 1.0) < TOLERANCE
    assert cached == [0, 64] * 3, "tokens found in the cache by the first and the second request after each update"


def test_an_update_that_keeps_its_version_number_leaves_no_stale_block(started: tuple[VllmEngine, Models]) -> None:
    engine, models = started
    for model in (*models, models[0]):
        engine.receive(publish(7, weights_of(model)))
        requests = ask(0)
        assert largest_difference(model, requests, engine.generate(requests, DEADLINE_S), 1.0) < TOLERANCE


def test_requests_in_work_are_computed_again_and_new_ones_share_nothing_old(
    started: tuple[VllmEngine, Models], cached: list[int]
) -> None:
    engine, models = started
    engine.receive(publish(0, weights_of(models[0])))
    begun = next(  # it may end by itself: drawn until it has not
        one for one in (ask(0, 40) for _ in range(100)) if _runs(engine, one)
    )[0]
    engine.receive(publish(1, weights_of(models[1])))
    new = ask(1)[0]
    engine.submit([new])
    done: list[Generation] = []
    while engine.unfinished:
        done += engine.step()
    by_key = {generation.key: generation for generation in done}
    old = by_key[begun.key]
    split = old.weight_versions.count(0)
    assert old.weight_versions == (0,) * split + (1,) * (len(old.token_ids) - split) and split == 5
    differences = [
        (reference_log_probs(model, begun, old, 1.0) - torch.tensor(old.log_probs))[part].abs().tolist()
        for model, part in ((models[0], slice(0, split)), (models[1], slice(split, None)))
    ]
    assert max(map(max, filter(None, differences))) < TOLERANCE
    assert largest_difference(models[1], [new], [by_key[new.key]], 1.0) < TOLERANCE


def _runs(engine: VllmEngine, requests: list[GenerationRequest]) -> bool:
    engine.submit(requests)
    for _ in range(5):
        engine.step()
    return bool(engine.unfinished)
