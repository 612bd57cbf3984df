"""The baseline finds what words and length tell, and nothing else."""

from __future__ import annotations

import random

import pytest
import torch

from rlhf_ray.errors import RequestError
from rlhf_ray.evaluation import bag_of_words_baseline
from rlhf_ray.evaluation.baseline import fit

WORDS = [f"word{i}" for i in range(30)]


def sentences(count: int, seed: int, length: int = 6) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=length)) for _ in range(count)]


def test_it_finds_a_word_that_is_liked() -> None:
    chosen, rejected = [f"thanks {s}" for s in sentences(300, 0)], sentences(300, 1)
    pairs = list(zip(chosen, rejected, strict=True))
    assert bag_of_words_baseline(pairs[:200], pairs[200:]) == 1.0
    swapped = [(b, a) for a, b in pairs[200:]]
    assert bag_of_words_baseline(pairs[:200], swapped) == 0.0


def test_it_finds_length_where_the_words_are_new() -> None:
    """Held-out answers share no word with the training pairs, so only the length is left."""
    training = [(a, b) for a, b in zip(sentences(200, 0, length=9), sentences(200, 1, length=5), strict=True)]
    held_out = [("x y z u v w", "p q"), ("a b c", "d")]
    assert bag_of_words_baseline(training, held_out) == 1.0


def test_it_cannot_tell_order_or_prompts_apart() -> None:
    """Same words in another order: every verdict is a tie, and a tie is one half."""
    pairs = [(s, " ".join(reversed(s.split()))) for s in sentences(50, 3)]
    assert bag_of_words_baseline(sentences_pairs(100), pairs) == 0.5


def sentences_pairs(count: int) -> list[tuple[str, str]]:
    return list(zip(sentences(count, 4), sentences(count, 5), strict=True))


def test_noise_is_one_half() -> None:
    assert bag_of_words_baseline(sentences_pairs(800)[:400], sentences_pairs(800)[400:]) == pytest.approx(0.5, abs=0.08)


def test_the_fit_is_the_minimum() -> None:
    """Where the gradient of ``2 sum softplus(-d @ w) + |w|^2 / 2`` is zero; the function is convex."""
    differences = torch.randn(60, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + 0.3
    weights = fit(differences)
    pull = 2 * torch.sigmoid(-(differences @ weights)) @ differences
    assert weights.norm() > 0.5 and (weights - pull).abs().max() < 1e-3


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(RequestError, match="0 training pairs and 1 held-out pairs"):
        bag_of_words_baseline([], [("a", "b")])
