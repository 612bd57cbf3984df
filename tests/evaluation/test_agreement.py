"""The noise of sound models keeps to the bounds; a difference that most tokens have, or one in a hundred, does not."""

from __future__ import annotations

import pytest
import torch

from rlhf_ray.evaluation.agreement import LOG_PROB_BOUNDS, SCORE_BOUNDS, Bounds, Spread, loosest

PUBLISHED = {"vLLM and trainer": (0.0499, 0.113, 0.477), "the trainer twice": (0.0554, 0.117, 0.656)}
"""Standard deviation, 95th percentile and largest of 3,916 tokens of Qwen2.5-0.5B in bf16 (TRL issue 6789)."""
TOKENS, SEEDS = 3916, 300


def noise(deviation: float, seed: int, tokens: int = TOKENS) -> torch.Tensor:
    """Differences with the tails of the published ones: Student's t of four degrees of freedom."""
    torch.manual_seed(seed)
    return torch.distributions.StudentT(4.0).sample((tokens,)) * deviation / 2**0.5


@pytest.mark.parametrize("published", PUBLISHED)
def test_the_noise_has_the_published_distribution(published: str) -> None:
    deviation, p95, largest = PUBLISHED[published]
    drawn = [noise(deviation, seed).abs() for seed in range(SEEDS)]
    assert float(torch.stack(drawn).quantile(0.95)) == pytest.approx(p95, rel=0.15)
    maxima = torch.tensor([float(each.max()) for each in drawn])
    assert float(maxima.quantile(0.1)) < largest < float(maxima.max())


@pytest.mark.parametrize("published", PUBLISHED)
@pytest.mark.parametrize("tokens", [1, 8, 100, TOKENS])
def test_published_noise_passes_over_few_tokens_and_many(published: str, tokens: int) -> None:
    spreads = [Spread(noise(PUBLISHED[published][0], seed, tokens)) for seed in range(SEEDS)]
    refused = [spread for spread in spreads if not spread.within(LOG_PROB_BOUNDS["bf16"])]
    assert not refused, f"{len(refused)} of {SEEDS}, such as {refused[0]}"
    assert tokens < TOKENS or max(spread.largest for spread in spreads) > 0.5, "the bound on the largest was 0.5"


def test_a_mixture_whose_router_moves_single_tokens_far_passes() -> None:
    """A mean of 0.016 nats, and single tokens 5 nats off, as published for a mixture of 35B."""
    differences = noise(0.02, 0, 20000)
    differences[:3] = torch.tensor([5.1, -3.0, 2.4])
    assert Spread(differences).within(LOG_PROB_BOUNDS["bf16"])


@pytest.mark.parametrize(
    "fault",
    [
        lambda differences: differences.abs() + 0.06,
        lambda differences: torch.where(torch.arange(len(differences)) % 50 == 0, 0.5, differences),
        lambda differences: torch.where(torch.arange(len(differences)) % 300 == 0, 3.0, differences),
        lambda differences: torch.where(torch.arange(len(differences)) == 7, 12.0, differences),
        lambda differences: torch.where(torch.arange(len(differences)) == 7, float("nan"), differences),
        lambda differences: torch.where(torch.arange(len(differences)) == 7, float("inf"), differences),
    ],
    ids=["all", "two in a hundred", "the end of every answer", "what one side forbids", "nan", "infinite"],
)
def test_a_difference_that_is_no_noise_does_not_pass(fault: object) -> None:
    differences = noise(0.0499, 0)
    assert Spread(differences).within(LOG_PROB_BOUNDS["bf16"])
    assert not Spread(fault(differences)).within(LOG_PROB_BOUNDS["bf16"])  # type: ignore[operator]


def test_full_precision_allows_no_outlier() -> None:
    differences = torch.full((5000,), 1e-6)
    assert Spread(differences).within(LOG_PROB_BOUNDS["fp32"])
    differences[9] = 2e-4
    assert not Spread(differences).within(LOG_PROB_BOUNDS["fp32"])
    assert not Spread(torch.tensor([1.5e-4])).within(LOG_PROB_BOUNDS["fp32"]), "of one token either"


def test_figures_are_those_of_the_sizes_of_differences() -> None:
    spread = Spread(torch.arange(-1000.0, 0.0))
    assert (spread.count, spread.mean, spread.p99, spread.largest) == (1000, 500.5, 990.0, 1000.0)
    assert str(Spread(torch.tensor([-0.5]))) == "mean 5.0e-01, 99 % 5.0e-01, largest 5.0e-01"


def test_bounds_in_words_and_of_sizes() -> None:
    assert str(LOG_PROB_BOUNDS["fp32"]) == "<= 0.0001"
    assert str(LOG_PROB_BOUNDS["bf16"]) == "mean <= 0.06, 99 % 0.35, 99.9 % 2, largest 10"
    assert SCORE_BOUNDS["bf16"].times(10.0).largest == pytest.approx(2.0)
    assert loosest([Bounds.of_all(1e-4), LOG_PROB_BOUNDS["bf16"], LOG_PROB_BOUNDS["fp16"]]) == LOG_PROB_BOUNDS["bf16"]
