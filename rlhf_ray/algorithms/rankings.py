"""Losses of reward models, one number per preference pair, from ``difference = r_chosen - r_rejected``.

A ranking may read one number of each pair besides its scores, such as its margin or its grade. That is a column of the data,
and ``reads`` names it.

Invariants:

- A ranking and its gradient are finite at every finite difference.
- A ranking depends on the two scores through their difference alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

Column = Literal["margin", "grade"]


@runtime_checkable
class Ranking(Protocol):
    """Computes the loss of each pair. ``number`` is the column that it reads, or None where the data have no such column."""

    @property
    def reads(self) -> Column:
        """The column of the data that ``number`` comes from."""

    @property
    def requires_number(self) -> bool:
        """Whether the ranking is undefined without that column."""

    def __call__(self, difference: Float[Tensor, "P"], number: Float[Tensor, "P"] | None) -> Float[Tensor, "P"]:
        """Return the loss of each pair."""


@dataclass(frozen=True)
class Sigmoid:
    """Bradley-Terry: ``softplus(m - d) = -log sigmoid(d - m)`` with the pair's margin m or 0 (Ouyang et al. 2022; Touvron et
    al. 2023, eq. 2).
    """

    reads: ClassVar[Column] = "margin"
    requires_number: ClassVar[bool] = False

    def __call__(self, difference: Float[Tensor, "P"], number: Float[Tensor, "P"] | None) -> Float[Tensor, "P"]:
        return -F.logsigmoid(_subtract_margin(difference, number))


@dataclass(frozen=True)
class LogExp:
    """``log(1 + exp(m - d))`` (Bai et al. 2022): the same function as :class:`Sigmoid`, under another name and formula."""

    reads: ClassVar[Column] = "margin"
    requires_number: ClassVar[bool] = False

    def __call__(self, difference: Float[Tensor, "P"], number: Float[Tensor, "P"] | None) -> Float[Tensor, "P"]:
        past_margin = _subtract_margin(difference, number)
        return torch.logaddexp(torch.zeros_like(past_margin), -past_margin)


@dataclass(frozen=True)
class Hinge:
    """``max(0, m - d)`` with the pair's margin, or ``margin`` where the data have none (Zhao et al. 2023)."""

    margin: float = 1.0

    reads: ClassVar[Column] = "margin"
    requires_number: ClassVar[bool] = False

    def __call__(self, difference: Float[Tensor, "P"], number: Float[Tensor, "P"] | None) -> Float[Tensor, "P"]:
        return F.relu((self.margin if number is None else number) - difference)


@dataclass(frozen=True)
class Focal:
    """``-(1 - 2 max(0, sigmoid(d - m) - 1/2))^gamma log sigmoid(d - m)`` (Cai et al. 2024, eq. 1).

    Pairs that are already right count less. For d > m the weight is ``(2 sigmoid(m - d))^gamma``; its logarithm stays exact
    where ``1 - 2 (..)`` would lose digits.
    """

    gamma: float = 2.0

    reads: ClassVar[Column] = "margin"
    requires_number: ClassVar[bool] = False

    def __call__(self, difference: Float[Tensor, "P"], number: Float[Tensor, "P"] | None) -> Float[Tensor, "P"]:
        past_margin = _subtract_margin(difference, number)
        log_weight = (math.log(2.0) + F.logsigmoid(-past_margin)).clamp(max=0.0)
        return -torch.exp(self.gamma * log_weight) * F.logsigmoid(past_margin)


@dataclass(frozen=True)
class Scaled:
    """``-m log sigmoid(d)``, where the margin m is the weight of the pair (Wang et al. 2024, HelpSteer2-Preference, eq. 3)."""

    reads: ClassVar[Column] = "margin"
    requires_number: ClassVar[bool] = True

    def __call__(self, difference: Float[Tensor, "P"], number: Float[Tensor, "P"] | None) -> Float[Tensor, "P"]:
        return -_require_number(number, "scaled") * F.logsigmoid(difference)


@dataclass(frozen=True)
class Ordinal:
    """Graded preferences and ties, by thresholds ``0 < t_1 < .. < t_K`` (McCullagh 1980; with K = 1 Rao and Kupper 1967).

    Grade 0 is a tie: ``P = sigmoid(d + t_1) - sigmoid(d - t_1)``. Grade k says that the chosen side is better by k grades:
    ``P = sigmoid(d - t_k) - sigmoid(d - t_{k+1})``, for the highest grade without the second term. The loss is ``-log P``,
    computed with ``sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a))``. Raises ``ValueError`` where the
    thresholds are not ascending numbers above 0.
    """

    thresholds: tuple[float, ...]

    reads: ClassVar[Column] = "grade"
    requires_number: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.thresholds or any(a >= b for a, b in zip((0.0, *self.thresholds), self.thresholds, strict=False)):
            raise ValueError(f"thresholds are {self.thresholds}: give ascending numbers above 0, one per grade")

    def __call__(self, difference: Float[Tensor, "P"], number: Float[Tensor, "P"] | None) -> Float[Tensor, "P"]:
        grade = _require_number(number, "ordinal").long()
        first, *_ = self.thresholds
        lower = difference.new_tensor([-first, *self.thresholds])[grade]
        upper = difference.new_tensor([*self.thresholds, math.inf])[grade]
        inside = torch.log1p(-torch.exp(lower - upper))
        return -(F.logsigmoid(difference - lower) + F.logsigmoid(upper - difference) + inside)


def _subtract_margin(difference: Tensor, margin: Tensor | None) -> Tensor:
    return difference if margin is None else difference - margin


def _require_number(number: Tensor | None, name: str) -> Tensor:
    if number is None:
        raise ValueError(f"the ranking {name} reads a number of each pair, but the batch has none")
    return number
