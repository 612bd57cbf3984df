"""The baseline that a reward model must beat: logistic regression on the words of an answer and its length.

Invariants:

- The prediction is a difference of two scores without an intercept, so that swapping the sides swaps the verdict.
- The baseline sees the answers alone, never the prompt. Its vocabulary comes from the training pairs only.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import torch
from jaxtyping import Float64
from torch import Tensor
from torch.nn.functional import softplus

from rlhf_ray.errors import RequestError
from rlhf_ray.evaluation.preferences import accuracy

AnswerPair = tuple[str, str]
"""The chosen and the rejected answer."""
WORD = re.compile(r"\w+|[^\w\s]")


def bag_of_words_baseline(training: Sequence[AnswerPair], held_out: Sequence[AnswerPair]) -> float:
    """Return the accuracy on ``held_out`` of a logistic regression on differences of word counts and of length in words.

    Raises ``RequestError`` where there are no pairs to learn from or to predict.
    """
    if not training or not held_out:
        raise RequestError(
            f"{len(training)} training pairs and {len(held_out)} held-out pairs: give one or more of each"
        )
    words = sorted({word for pair in training for answer in pair for word in _words(answer)})
    columns = {word: column for column, word in enumerate(words)}
    lengths = torch.tensor([_length_difference(pair) for pair in training], dtype=torch.float64)
    scale = float(lengths.square().mean().sqrt()) or 1.0
    weights = fit(_features(training, columns, scale))
    verdict = (_features(held_out, columns, scale) @ weights).numpy()
    return accuracy(verdict, 0.0 * verdict)


def fit(differences: Float64[Tensor, "pairs features"]) -> Float64[Tensor, " features"]:
    """Find the weights ``w`` that minimise ``2 sum softplus(-differences @ w) + |w|^2 / 2``.

    This is a logistic regression in which each pair counts twice, once from either side: with the features ``d`` and ``-d``.
    """
    weights = torch.zeros(differences.shape[1], dtype=differences.dtype, requires_grad=True)
    descent = torch.optim.LBFGS([weights], max_iter=1000, tolerance_grad=1e-4, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        descent.zero_grad()
        total = 2 * softplus(-(differences @ weights)).sum() + weights.square().sum() / 2
        total.backward()
        return total

    descent.step(loss)
    return weights.detach()


def _words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def _length_difference(pair: AnswerPair) -> int:
    chosen, rejected = pair
    return len(chosen.split()) - len(rejected.split())


def _features(pairs: Sequence[AnswerPair], columns: dict[str, int], scale: float) -> Tensor:
    """Make a sparse (pairs, words + 1) matrix, chosen minus rejected: counts of known words, and the scaled length."""
    entries: dict[tuple[int, int], float] = {}
    for row, pair in enumerate(pairs):
        chosen, rejected = (Counter(_words(answer)) for answer in pair)
        chosen.subtract(rejected)
        entries |= {(row, columns[word]): count for word, count in chosen.items() if count and word in columns}
        entries[row, len(columns)] = _length_difference(pair) / scale
    places = torch.tensor(list(entries), dtype=torch.long).T
    values = torch.tensor(list(entries.values()), dtype=torch.float64)
    return torch.sparse_coo_tensor(places, values, (len(pairs), len(columns) + 1), check_invariants=True)
