"""How well two scores of a pair agree with what was preferred: one number a pair, from ``difference = r_chosen - r_rejected``.

Always true: every ranking is finite, with a finite gradient, at any finite difference; it depends on the scores through
their difference alone; a pair's own number (its margin, its strength, its grade) is a column of the data, which a ranking
names in ``reads``.
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
    """A loss a pair. ``number`` is the pair's own number, none where the data have no such column."""

    @property
    def reads(self) -> Column:
        """The column of the data that ``number`` comes from."""

    @property
    def needs(self) -> bool:
        """Whether it means nothing without that column."""

    def __call__(self, difference: Float[Tensor, "P"], number: Float[Tensor, "P"] | None) -> Float[Tensor, "P"]:
        """The loss of each pair."""


@dataclass(frozen=True)
class Sigmoid:
    """Bradley-Terry: ``softplus(m - d) = -log sigmoid(d - m)`` with the pair's margin m or 0 (Ouyang et al. 2022; Touvron et
    al. 2023, eq. 2).
    """

    reads: ClassVar[Column] = "margin"
    needs: ClassVar[bool] = False

    def __call__(self, difference: Float[Tensor, "P"], number: Float[Tensor, "P"] | None) -> Float[Tensor, "P"]:
        return -F.logsigmoid(_beyond(difference, number))


@dataclass(frozen=True)
class LogExp:
    """``log(1 + exp(m - d))`` (Bai et al. 2022): :class:`Sigmoid` as it is called elsewhere, here without overflow."""

    reads: ClassVar[Column] = "margin"
    needs: ClassVar[bool] = False

    def __call__(self, difference: Float[Tensor, "P"], number: Float[Tensor, "P"] | None) -> Float[Tensor, "P"]:
        beyond = _beyond(difference, number)
        return torch.logaddexp(torch.zeros_like(beyond), -beyond)


@dataclass(frozen=True)
class Hinge:
    """``max(0, m - d)`` with the pair's margin, or ``margin`` where the data have none (Zhao et al. 2023)."""

    margin: float = 1.0

    reads: ClassVar[Column] = "margin"
    needs: ClassVar[bool] = False

    def __call__(self, difference: Float[Tensor, "P"], number: Float[Tensor, "P"] | None) -> Float[Tensor, "P"]:
        return F.relu((self.margin if number is None else number) - difference)


@dataclass(frozen=True)
class Focal:
    """``-(1 - 2 max(0, sigmoid(d - m) - 1/2))^gamma log sigmoid(d - m)``: pairs that are right already count less (Cai et
    al. 2024, eq. 1).

    For d > m the weight is ``(2 sigmoid(m - d))^gamma``, whose logarithm is exact where ``1 - 2 (..)`` would cancel.
    """

    gamma: float = 2.0

    reads: ClassVar[Column] = "margin"
    needs: ClassVar[bool] = False

    def __call__(self, difference: Float[Tensor, "P"], number: Float[Tensor, "P"] | None) -> Float[Tensor, "P"]:
        beyond = _beyond(difference, number)
        log_weight = (math.log(2.0) + F.logsigmoid(-beyond)).clamp(max=0.0)
        return -torch.exp(self.gamma * log_weight) * F.logsigmoid(beyond)


@dataclass(frozen=True)
class Scaled:
    """``-m log sigmoid(d)``: the margin says how much a pair counts (Wang et al. 2024, HelpSteer2-Preference, eq. 3)."""

    reads: ClassVar[Column] = "margin"
    needs: ClassVar[bool] = True

    def __call__(self, difference: Float[Tensor, "P"], number: Float[Tensor, "P"] | None) -> Float[Tensor, "P"]:
        return -_given(number, "scaled") * F.logsigmoid(difference)


@dataclass(frozen=True)
class Ordinal:
    """Graded preferences and ties, by thresholds ``0 < t_1 < .. < t_K`` (McCullagh 1980; with K = 1 Rao and Kupper 1967).

    Grade 0 is a tie: ``P = sigmoid(d + t_1) - sigmoid(d - t_1)``. Grade k says that chosen is better by k:
    ``P = sigmoid(d - t_k) - sigmoid(d - t_{k+1})``, the last one without the second term. The loss is ``-log P``, by
    ``sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a))``.
    """

    thresholds: tuple[float, ...]

    reads: ClassVar[Column] = "grade"
    needs: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.thresholds or any(a >= b for a, b in zip((0.0, *self.thresholds), self.thresholds, strict=False)):
            raise ValueError(f"thresholds are {self.thresholds}: give ascending numbers above 0, one a grade")

    def __call__(self, difference: Float[Tensor, "P"], number: Float[Tensor, "P"] | None) -> Float[Tensor, "P"]:
        grade = _given(number, "ordinal").long()
        first, *_ = self.thresholds
        lower = difference.new_tensor([-first, *self.thresholds])[grade]
        upper = difference.new_tensor([*self.thresholds, math.inf])[grade]
        inside = torch.log1p(-torch.exp(lower - upper))
        return -(F.logsigmoid(difference - lower) + F.logsigmoid(upper - difference) + inside)


def _beyond(difference: Tensor, margin: Tensor | None) -> Tensor:
    return difference if margin is None else difference - margin


def _given(number: Tensor | None, name: str) -> Tensor:
    if number is None:
        raise ValueError(f"the ranking {name} reads a number of each pair, but the batch has none")
    return number
