"""Measure what several samples per prompt give: pass@k, best-of-n, and the KL divergence of best-of-n.

Invariant: from N samples a figure is the exact mean over all subsets of the requested size, so it is unbiased and adds no
randomness of its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import ArrayLike

from rlhf_ray.errors import RequestError
from rlhf_ray.evaluation.preferences import finite_scores

QUADRATURE = 400
"""Points of an integral: enough for ten digits up to n = 1000."""


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Return the probability that k of the samples hold a correct one: ``1 - C(N - c, k) / C(N, k)`` (Chen et al. 2021, eq. 1).

    Raises ``RequestError`` where k or ``correct`` is out of range.
    """
    if not 0 <= correct <= samples:
        raise RequestError(f"{correct} of {samples} samples cannot be correct")
    _check_subset(k, samples, "k")
    return float(1 - Fraction(math.comb(samples - correct, k), math.comb(samples, k)))


def mean_pass_at_k(right: Sequence[Sequence[bool]], k: int) -> float:
    """Average pass@k over prompts; ``right[p]`` says of each sample of prompt p whether it is correct."""
    if not len(right):
        raise RequestError("pass@k of no prompts is undefined: give one prompt or more")
    return math.fsum(pass_at_k(len(samples), sum(samples), k) for samples in right) / len(right)


def best_of_n(rewards: Sequence[ArrayLike], gold: Sequence[ArrayLike], n: int) -> float:
    """Return the expected gold score of the sample with the highest reward among n, averaged over prompts.

    ``rewards`` and ``gold`` hold the N samples of each prompt. Sorted by reward, the sample of rank i (from 0) is the best of a
    random subset of n with probability ``C(i, n - 1) / C(N, n)``; samples of equal reward share theirs equally.
    """
    if not len(rewards) or len(rewards) != len(gold):
        raise RequestError(f"rewards has {len(rewards)} prompts and gold {len(gold)}: give both for each prompt")
    expected = [_best_of_n(r, g, n, prompt) for prompt, (r, g) in enumerate(zip(rewards, gold, strict=True))]
    return math.fsum(expected) / len(expected)


def _best_of_n(rewards: ArrayLike, gold: ArrayLike, n: int, prompt: int) -> float:
    score, truth = finite_scores(rewards, f"rewards[{prompt}]"), finite_scores(gold, f"gold[{prompt}]")
    if score.shape != truth.shape:
        raise RequestError(f"prompt {prompt} has {len(score)} rewards, but {len(truth)} gold scores")
    _check_subset(n, len(score), "n")
    total = math.comb(len(score), n)
    # C(i, n - 1) summed over ranks below a is C(a, n): a group of ties from rank a to b has C(b, n) - C(a, n) subsets.
    _, group, sizes = np.unique(score, return_inverse=True, return_counts=True)
    ends = np.cumsum(sizes).tolist()
    means = np.bincount(group, weights=truth) / sizes
    subsets = [math.comb(end, n) - math.comb(end - size, n) for end, size in zip(ends, sizes.tolist(), strict=True)]
    return math.fsum(mean * (count / total) for mean, count in zip(means.tolist(), subsets, strict=True))


def best_of_n_kl(n: int) -> float:
    """Return the KL in nats between the best of n and one sample: ``log n - (n - 1) / n``, exact without ties, else a bound."""
    if n < 1:
        raise RequestError(f"best of {n} samples is undefined: n starts at 1")
    return math.log(n) - (n - 1) / n


def top_k_of_n_kl(k: int, n: int) -> float:
    """Return the KL in nats between one of the k best of n, drawn evenly, and one sample; exact without ties, else a bound.

    At the quantile u of the reward the density is ``n / k`` times the probability that fewer than k of n - 1 others are better.
    Its relative entropy is integrated by Gauss's rule; for k = 1 that is :func:`best_of_n_kl`, for k = n it is 0.
    """
    _check_subset(k, n, "k")
    # Substituting u = 1 - v^2 puts the points where the density changes: near u = 1, within 1 / n of it.
    points, weights = np.polynomial.legendre.leggauss(QUADRATURE)
    v = (points + 1) / 2
    better, others = v**2, n - 1
    ways = [math.lgamma(n) - math.lgamma(j + 1) - math.lgamma(n - j) for j in range(k)]  # as logarithms: they are huge
    terms = (np.exp(way + j * np.log(better) + (others - j) * np.log1p(-better)) for j, way in enumerate(ways))
    density = n / k * np.sum([*terms], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        entropy = np.where(density > 0, density * np.log(density), 0.0)
    return max(0.0, float((weights / 2 * entropy * 2 * v).sum()))


def _check_subset(size: int, samples: int, name: str) -> None:
    if not 1 <= size <= samples:
        raise RequestError(f"{name} is {size}, but there are {samples} samples: use 1 to {samples}")
