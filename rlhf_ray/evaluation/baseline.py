"""What a reward model must beat: logistic regression on which words an answer has and how long it is.

Always true: the model is a difference of two scores (no intercept), so that swapping the sides swaps the verdict; it
sees the answers alone, never the prompt; and the vocabulary comes from the training pairs only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_ray.errors import RequestError
from rlhf_ray.evaluation.preferences import accuracy

AnswerPair = tuple[str, str]
"""The chosen and the rejected answer."""


def bag_of_words_baseline(training: Sequence[AnswerPair], held_out: Sequence[AnswerPair]) -> float:
    """Accuracy on ``held_out`` of a logistic regression on differences of word counts and of length in words."""
    if not training or not held_out:
        raise RequestError(f"{len(training)} training pairs and {len(held_out)} held-out pairs: give some of each")
    from scipy.sparse import hstack, vstack
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    words = CountVectorizer(token_pattern=r"\w+|[^\w\s]", dtype=np.float64)
    words.fit([answer for pair in training for answer in pair])

    def differences(pairs: Sequence[AnswerPair]) -> tuple[Any, NDArray[np.float64]]:
        """Word counts of chosen minus rejected (sparse), and the difference in length."""
        chosen, rejected = ([pair[side] for pair in pairs] for side in (0, 1))
        lengths = np.array([len(c.split()) - len(r.split()) for c, r in pairs], dtype=np.float64)
        return words.transform(chosen) - words.transform(rejected), lengths[:, None]

    counts, lengths = differences(training)
    scale = np.sqrt(np.mean(np.square(lengths))) or 1.0
    features = hstack([counts, lengths / scale]).tocsr()
    model = LogisticRegression(fit_intercept=False, max_iter=1000)
    model.fit(vstack([features, -features]), np.repeat([1, 0], len(training)))  # each pair from both sides
    counts, lengths = differences(held_out)
    verdict = model.decision_function(hstack([counts, lengths / scale]).tocsr())
    return accuracy(verdict, np.zeros_like(verdict))
