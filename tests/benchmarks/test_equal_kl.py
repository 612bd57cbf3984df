"""A policy that is best-of-n has ratio 1; the curve is that of the slow mean over subsets; samples have their own log-probs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig

from benchmarks.equal_kl import NEW_TOKENS, at_equal_kl, best_of_curve, log_prob, read_at, sample, score, subset_weights
from rlhf_ray.evaluation import best_of_n, best_of_n_kl

CONFIG = LlamaConfig(
    vocab_size=12, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, pad_token_id=0,
    eos_token_id=1, num_labels=1,
)  # fmt: skip
PROMPTS = [[5, 6, 7, 8], [3], [9, 4, 2]]


def pool(prompts: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Rewards with ties, and wins that go with them, but not always."""
    random = np.random.default_rng(3)
    rewards = random.integers(0, 6, (prompts, size)).astype(float)
    return rewards, (random.random((prompts, size)) < 0.2 + 0.1 * rewards).astype(float)


@pytest.mark.parametrize("n", [1, 2, 7, 24])
def test_the_curve_is_the_mean_over_all_subsets_with_ties_shared(n: int) -> None:
    rewards, wins = pool(9, 24)
    assert subset_weights(24, n).sum() == pytest.approx(1.0)
    assert best_of_curve(rewards, wins, [n]).mean() == pytest.approx(best_of_n([*rewards], [*wins], n))


def test_a_policy_that_is_best_of_n_has_ratio_one_at_its_own_kl() -> None:
    rewards, wins = pool(400, 64)
    for n in (1, 6, 20):
        policy = best_of_curve(rewards, wins, [n])[0]
        found = at_equal_kl(policy, np.full(400, best_of_n_kl(n)), rewards, wins)
        assert found.n == pytest.approx(n, rel=0.02) and found.kl == pytest.approx(best_of_n_kl(n))
        assert found.ratio == pytest.approx(1.0, abs=0.01)
        assert found.interval[0] <= found.ratio <= found.interval[1]
        worse = at_equal_kl(0.9 * policy, np.full(400, best_of_n_kl(n)), rewards, wins)
        assert worse.ratio == pytest.approx(0.9, abs=0.01) and worse.interval[1] < 1.0


def test_a_policy_farther_away_than_the_pool_reaches_is_refused() -> None:
    with pytest.raises(ValueError, match="raise the pool"):
        read_at(3.0, [1, 4], np.array([0.5, 0.6]))


def test_an_answer_has_the_log_probability_of_the_model_that_gave_it_and_ends_at_its_end() -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIG).eval()
    answers = sample(model, PROMPTS * 20, 1, torch.Generator().manual_seed(0))
    assert all(1 not in ids[:-1] and (ids[-1] == 1 or len(ids) == NEW_TOKENS) for ids in answers.ids)
    assert len({len(ids) for ids in answers.ids}) > 3, "so that the padding differs"
    assert answers.log_probs == pytest.approx(log_prob(model, PROMPTS * 20, answers.ids), abs=1e-4)
    alone = [log_prob(model, [prompt], [ids])[0] for prompt, ids in zip(PROMPTS * 20, answers.ids, strict=True)]
    assert answers.log_probs == pytest.approx(alone, abs=1e-4)


def test_tokens_are_drawn_as_often_as_the_model_says() -> None:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIG).eval()
    first = [ids[0] for ids in sample(model, [PROMPTS[0]] * 4000, 1, torch.Generator().manual_seed(0)).ids]
    expected = [np.exp(log_prob(model, [PROMPTS[0]], [[token]])[0]) for token in range(12)]
    assert np.bincount(first, minlength=12) / 4000 == pytest.approx(expected, abs=0.03)


def test_a_score_is_that_of_transformers_at_the_last_token() -> None:
    torch.manual_seed(2)
    model = AutoModelForSequenceClassification.from_config(CONFIG).eval()
    answers = [[4, 1], [2, 3, 5, 1], [1]]
    theirs = [
        model(torch.tensor([[*prompt, *answer]])).logits[0, 0].item()
        for prompt, answer in zip(PROMPTS, answers, strict=True)
    ]
    assert score(model, PROMPTS, answers) == pytest.approx(theirs, abs=1e-5)
