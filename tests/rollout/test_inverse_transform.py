"""A token is drawn with the probability that its log-prob says, from its own row and random stream alone."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.rollout.requests import GenerationRequest
from rlhf_ray.rollout.vllm_sampling import inverse_transform
from rlhf_ray.rollout.vllm_sampling.inverse_transform import BELOW_ONE, BLOCK, InverseTransformInWorker, draw, uniform
from tests.rollout.llamas import EOS, make_llama

pytestmark = pytest.mark.vllm


def log_probs(vocabulary: int, rows: int = 1) -> Tensor:
    torch.manual_seed(vocabulary)
    return torch.randn(rows, vocabulary).mul(3).log_softmax(-1)


@pytest.mark.parametrize("vocabulary", [5, BLOCK, BLOCK + 1, 3 * BLOCK - 7])
def test_the_numbers_that_give_a_token_are_as_many_as_its_probability_says(vocabulary: int) -> None:
    """Of evenly spread numbers: each token has an interval, and its length is its probability."""
    given, count = log_probs(vocabulary), 40_000
    numbers = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = draw(given.expand(count, -1), numbers)
    assert drawn.diff().min() >= 0, "one interval a token, in order"
    shares = drawn.bincount(minlength=vocabulary).double() / count
    assert float((shares - given[0].double().exp()).abs().max()) <= 1.5 / count


def test_a_token_without_probability_is_never_drawn() -> None:
    given = log_probs(2 * BLOCK + 3)
    impossible = torch.rand(given.shape[1]) < 0.5
    impossible[[0, BLOCK - 1, BLOCK, 2 * BLOCK + 2]] = True
    impossible[BLOCK : 2 * BLOCK] = True  # a whole block
    given = given.masked_fill(impossible, -torch.inf)
    numbers = torch.cat(
        [torch.tensor([0.0, 2.0**-53, BELOW_ONE, 1.0 - 2.0**-53]), torch.linspace(0, 1, 20_000)[:-1]]
    ).double()
    assert not impossible[draw(given.expand(len(numbers), -1), numbers)].any()


def test_a_certain_token_is_drawn_by_every_number() -> None:
    given = torch.full((1, 2 * BLOCK), -torch.inf)
    given[0, BLOCK + 4] = 0.0
    numbers = torch.tensor([0.0, 0.5, 1.0 - 2.0**-53], dtype=torch.float64)
    assert draw(given.expand(3, -1), numbers).tolist() == [BLOCK + 4] * 3


def test_rare_tokens_behind_a_likely_one_are_not_lost_in_the_sum() -> None:
    """64 blocks of tokens, each of 2**-26 together: less than fp32 can add to a number near 1."""
    rare, blocks = 2.0**-20, 64
    given = torch.full((1, (1 + blocks) * BLOCK), rare / (blocks * BLOCK), dtype=torch.float64)
    given[0, :BLOCK] = torch.zeros(BLOCK)
    given[0, 0] = 1.0 - rare
    numbers = 1.0 - rare * (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    drawn = draw(given.log().float().expand(1000, -1), numbers)
    # exp in fp32 rounds the likely one by 2**-24, four of these blocks.
    assert len({token // BLOCK for token in drawn.tolist()}) >= blocks - 5


def test_a_row_with_a_generator_draws_the_same_whatever_is_beside_it() -> None:
    given = log_probs(1000, rows=6)

    def of(rows: list[int]) -> list[int]:
        generators = {place: torch.Generator().manual_seed(row) for place, row in enumerate(rows)}
        return draw(given[rows], uniform(len(rows), generators)).tolist()

    alone = {row: of([row])[0] for row in range(6)}
    torch.rand(7)
    assert of([5, 3, 0]) == [alone[5], alone[3], alone[0]]
    assert len({*torch.stack([uniform(4, {}) for _ in range(2)]).flatten().tolist()}) == 8
    for numbers in (uniform(50, {}), uniform(1, {0: torch.Generator()})):
        assert bool((numbers * 2**24 % 1).any()), "finer than a probability in fp32 may be"


def test_vllm_calls_its_sampler_as_before_and_gets_the_log_probs_that_it_would_have_made() -> None:
    from vllm.v1.sample.sampler import Sampler

    class Runner:
        sampler = Sampler(logprobs_mode="processed_logprobs")

    logits = torch.randn(3, 700)
    module = Runner.sampler.topk_topp_sampler
    names = list(inspect.signature(module.forward).parameters)
    _, theirs = module(logits.clone(), {}, torch.tensor([5, 700, 2]), None)
    worker = InverseTransformInWorker()
    worker.model_runner = Runner
    worker.sample_by_inverse_transform()
    assert list(inspect.signature(module.forward).parameters) == names
    sampled, ours = module(logits.clone(), {}, torch.tensor([5, 700, 2]), None)
    assert torch.equal(ours, theirs) and sampled.dtype == torch.int64
    assert bool(ours.gather(1, sampled[:, None]).isfinite().all())


def test_vllm_asks_its_sampler_for_log_probs_as_before_and_gets_the_same_ones() -> None:
    from vllm.v1.sample.sampler import Sampler

    class Runner:
        sampler = Sampler(logprobs_mode="processed_logprobs")

    given, tokens = log_probs(700, rows=3), torch.tensor([699, 0, 35])
    sampler = Runner.sampler
    names = list(inspect.signature(sampler.gather_logprobs).parameters)
    alone, beside = (sampler.gather_logprobs(given, number, tokens) for number in (0, 2))
    worker = InverseTransformInWorker()
    worker.model_runner = Runner
    worker.sample_by_inverse_transform()
    assert list(inspect.signature(sampler.gather_logprobs).parameters) == names
    ours = sampler.gather_logprobs(given, 0, token_ids=tokens)
    for name in ("logprob_token_ids", "logprobs", "selected_token_ranks"):
        own, theirs = getattr(ours, name), getattr(alone, name)
        assert (own.dtype, own.shape) == (theirs.dtype, theirs.shape)
        assert name == "selected_token_ranks" or torch.equal(own, theirs), "to the bit"
    assert alone.selected_token_ranks.min() > 0, "0 is the rank of no token"
    assert ours.selected_token_ranks.tolist() == [0, 0, 0]
    more = sampler.gather_logprobs(given, 2, tokens)
    assert all(torch.equal(own, theirs) for own, theirs in zip(more[:3], beside[:3], strict=True))


def test_an_engine_on_a_cpu_draws_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.sample import sampler

    from rlhf_ray.rollout.vllm_engine import VllmEngine

    def refused(*_: Any) -> Tensor:
        raise AssertionError("vLLM counted the ranks of tokens")

    drawn: list[int] = []
    original = inverse_transform.draw

    def noted(given: Tensor, numbers: Tensor) -> Tensor:
        tokens = original(given, numbers)
        drawn.extend(tokens.tolist())
        return tokens

    monkeypatch.setattr(inverse_transform, "draw", noted)
    config = RolloutConfig(dtype="fp32", max_model_tokens=64, kv_cache_gib=0.01)
    make_llama(0).save_pretrained(tmp_path)
    engine = VllmEngine(tmp_path, config, stop_token_ids=(EOS,), deterministic=True)
    monkeypatch.setattr(sampler, "batched_count_greater_than", refused)
    done = engine.generate([GenerationRequest(0, 0, (5, 6, 7), 11, 6)], 60.0)
    engine.shutdown()
    assert [token for one in done for token in one.token_ids] == drawn
