"""How often one policy's answers beat another's at the same prompts, also with their lengths made equal.

Invariants:

- A tie counts one half, so that swapping the policies turns a rate p into 1 - p, and a policy has 0.5 against itself.
- A prompt counts as one, whichever the number of its answers: each answer of the one policy meets each of the other.
- A rate with lengths controlled is that of answers of equal length, in the model that is fitted; where the length of no answer
  differs, it is the plain rate, but for the weak prior that keeps it finite where one policy always wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_ray.errors import NumericalError, RequestError
from rlhf_ray.evaluation.intervals import Interval, draw_prompts, ends_around, share_interval
from rlhf_ray.evaluation.preferences import finite_scores

PRIOR = 0.01
"""The precision of the normal prior around 0 of both parameters; an observation, a prompt, has at most 0.25."""
REFITS = 1000
"""How often the regression is fitted to prompts that are drawn again: fewer than means, since each takes longer."""
ROUNDS, CONVERGED = 100, 1e-9
"""Of Newton's method: its most rounds, and the gradient, of one prompt's size, at which it ends."""
ROWS_AT_ONCE = 1_000_000

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Meetings:
    """Every answer of one policy against every answer of the other, prompt by prompt."""

    wins: Array
    """1 where the first policy's answer is better, 0.5 at a tie, else 0; (meetings,)."""
    longer: Array
    """The length of the first policy's answer minus that of the other's; (meetings,)."""
    prompt: NDArray[np.int64]
    """Which prompt each is about, from 0; (meetings,)."""
    prompts: int

    @property
    def weights(self) -> Array:
        """What each counts: those of a prompt count one together."""
        counts: Array = 1.0 / np.bincount(self.prompt, minlength=self.prompts)
        return counts[self.prompt]

    def by_prompt(self, values: Array) -> Array:
        """The mean of ``values`` at each prompt."""
        means: Array = np.bincount(self.prompt, values * self.weights, self.prompts).astype(np.float64)
        return means


@dataclass(frozen=True)
class WinRate:
    """How often the first policy wins, ties half, and of how many meetings, as shares that add up to 1."""

    rate: float
    interval: Interval
    wins: float
    ties: float
    losses: float


@dataclass(frozen=True)
class ControlledWinRate:
    """The win rate at equal lengths."""

    rate: float
    interval: Interval
    length_effect: float
    """The log-odds of a win that being much longer adds; above 0 longer answers win more often."""


def meet(
    a: Sequence[ArrayLike], b: Sequence[ArrayLike], lengths_a: Sequence[ArrayLike], lengths_b: Sequence[ArrayLike]
) -> Meetings:
    """Compare the rewards of both policies' answers to each prompt; all four hold one list a prompt.

    Raises ``RequestError`` for lists that do not belong together, ``NumericalError`` for a reward that is not finite.
    """
    if not len(a) or len({len(a), len(b), len(lengths_a), len(lengths_b)}) > 1:
        sizes = ", ".join(str(len(each)) for each in (a, b, lengths_a, lengths_b))
        raise RequestError(
            f"rewards and lengths of {sizes} prompts cannot be compared: give the same prompts of both policies"
        )
    wins, longer, prompt = [], [], []
    for place, (one, other, length, other_length) in enumerate(zip(a, b, lengths_a, lengths_b, strict=True)):
        left, right = finite_scores(one, f"a[{place}]"), finite_scores(other, f"b[{place}]")
        own, others = finite_scores(length, f"lengths_a[{place}]"), finite_scores(other_length, f"lengths_b[{place}]")
        if (own.shape, others.shape) != (left.shape, right.shape):
            raise RequestError(f"prompt {place} has rewards and lengths of another number of answers")
        margin = left[:, None] - right[None, :]
        wins.append(((margin > 0) + 0.5 * (margin == 0)).ravel())
        longer.append((own[:, None] - others[None, :]).ravel())
        prompt.append(np.full(margin.size, place, np.int64))
    return Meetings(np.concatenate(wins), np.concatenate(longer), np.concatenate(prompt), len(a))


def paired_win_rate(meetings: Meetings, seed: int = 0) -> WinRate:
    """Return the mean over prompts of how often the first policy wins, with an interval over prompts."""
    by_prompt = meetings.by_prompt(meetings.wins)
    shares = [
        float(meetings.by_prompt((meetings.wins == value).astype(np.float64)).mean()) for value in (1.0, 0.5, 0.0)
    ]
    return WinRate(float(by_prompt.mean()), share_interval(by_prompt, seed), *shares)


def length_controlled_win_rate(meetings: Meetings, seed: int = 0) -> ControlledWinRate:
    """Return the win rate that answers of equal length would have (Dubois et al. 2024, AlpacaEval 2).

    A logistic regression of the outcome on ``tanh(difference in length / its standard deviation)``, whose intercept is the
    log-odds at no difference; in the deviation too a prompt counts as one. The paper's term for how hard an instruction is for
    both is fitted over a whole leaderboard, and has no counterpart between two policies: it is left out.
    """
    weights = meetings.weights
    middle = np.average(meetings.longer, weights=weights)
    spread = float(np.sqrt(np.average((meetings.longer - middle) ** 2, weights=weights)))
    longer = np.tanh(meetings.longer / spread) if spread > 0 else np.zeros_like(meetings.longer)
    fitted = _fit(meetings.wins, longer, weights[None, :])
    ((intercept, effect),) = fitted
    rate = float(_sigmoid(intercept))
    rates = []
    for counts in draw_prompts(meetings.prompts, resamples=REFITS, seed=seed):
        at_once = max(1, ROWS_AT_ONCE // len(weights))
        for start in range(0, len(counts), at_once):
            drawn = counts[start : start + at_once][:, meetings.prompt] * weights
            rates.append(_sigmoid(_fit(meetings.wins, longer, drawn, fitted)[:, 0]))
    low, high = ends_around(np.concatenate(rates), rate)
    by_prompt = meetings.by_prompt(meetings.wins)
    if (by_prompt == by_prompt[0]).all():  # drawing prompts again shows nothing of how far such a rate can be off
        lowest, highest = share_interval(by_prompt, seed)
        low, high = min(low, lowest), max(high, highest)
    return ControlledWinRate(rate, (low, high), float(effect))


def _fit(wins: Array, longer: Array, weights: Array, start: Array | None = None) -> Array:
    """Intercept and slope, (fits, 2), of one regression for each row of ``weights``, (fits, meetings), by Newton's method.

    ``start``, (1, 2), is where the search begins: near the end it needs half of the rounds.
    """
    parameters = np.zeros((len(weights), 2)) if start is None else np.repeat(start, len(weights), axis=0)
    design = np.stack([np.ones_like(longer), longer])
    for _ in range(ROUNDS):
        chances = _sigmoid(parameters @ design)
        gradient = (weights * (wins - chances)) @ design.T - PRIOR * parameters
        if np.abs(gradient).max() < CONVERGED * max(1.0, float(weights[0].sum())):
            return parameters
        curvature = weights * chances * (1 - chances)
        hessian = np.einsum("fm,im,jm->fij", curvature, design, design, optimize=True) + PRIOR * np.eye(2)
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        parameters += step
    raise NumericalError(f"the regression on lengths did not converge in {ROUNDS} rounds: report the plain win rate")


def _sigmoid(values: ArrayLike) -> Array:
    half: Array = 0.5 * np.asarray(values, dtype=np.float64)
    return 0.5 * (1.0 + np.tanh(half))
