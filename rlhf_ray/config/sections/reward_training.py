"""Sections of reward-model training: the loss, the optimizer's defaults, and how saved scores are normalised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

from pydantic import Field

from rlhf_ray.config.sections.base import NonNegativeFloat, PositiveFloat, Section
from rlhf_ray.config.sections.engine import EngineConfig, OptimizerConfig, Schedule
from rlhf_ray.config.sections.roles import RoleConfig

Odds = Annotated[float, Field(ge=0.0, lt=0.5)]
RankingName = Literal["sigmoid", "logexp", "hinge", "focal", "scaled", "ordinal"]


class RewardLossConfig(Section):
    """The loss on the two scores of a pair; docs/reward_training.md gives the formula of each name."""

    name: RankingName = "sigmoid"
    label_smoothing: Odds = 0.0
    """The probability that a label is wrong."""
    centering: NonNegativeFloat = 0.0
    router_balance: NonNegativeFloat = 0.0
    """Weight of the load-balancing loss of mixture-of-experts models."""
    hinge_margin: PositiveFloat = 1.0
    """The margin of the loss ``hinge`` for pairs that name none."""
    focal_gamma: PositiveFloat = 2.0
    """The exponent of the loss ``focal``."""
    thresholds: list[PositiveFloat] | None = None
    """Thresholds of the loss ``ordinal``, one per grade, ascending; null means 0.5, 1.5, ... up to the highest grade of the
    data."""

    def number_problem(self, margins: Sequence[float | None], grades: Sequence[float | None]) -> str:
        """Why the loss cannot read the numbers of pairs, with the way out; empty where it can, or reads none."""
        if self.name == "scaled":
            if None in margins:
                return (
                    "loss.name scaled reads the margin of each pair, but the rows have none: add a column margin, take the "
                    "difference of two ratings (data.ratings=margins), or choose another loss"
                )
            if any(margin is not None and margin < 0 for margin in margins):
                return "loss.name scaled weighs pairs by their margin, but some are negative: make them 0 or more"
        if self.name == "ordinal":
            if None in grades:
                return (
                    "loss.name ordinal reads the grade of each pair, but the rows have none: add a column grade, or choose "
                    "another loss"
                )
            return self._grade_problem([grade for grade in grades if grade is not None])
        return ""

    def _grade_problem(self, grades: Sequence[float]) -> str:
        wrong = next((grade for grade in grades if grade < 0 or grade != int(grade)), None)
        if wrong is not None:
            return f"the grade {wrong:g} of a pair is not one of 0, 1, 2, ...: 0 is a tie, 1 the weakest preference"
        highest = int(max(grades, default=1))
        if self.thresholds is not None and highest > len(self.thresholds):
            return (
                f"the highest grade of the pairs is {highest}, but loss.thresholds has {len(self.thresholds)} numbers: give "
                "one a grade"
            )
        return ""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        for key, name in (("hinge_margin", "hinge"), ("focal_gamma", "focal"), ("thresholds", "ordinal")):
            if self.name != name and not self.is_default(key):
                yield key, f"{getattr(self, key)} belongs to the loss {name}, but name is {self.name}: remove it"
        if self.thresholds is not None and (not self.thresholds or sorted(set(self.thresholds)) != self.thresholds):
            yield "thresholds", f"{self.thresholds} must be ascending numbers, one a grade"


class NormalizationConfig(Section):
    """The scores from which ``mean`` and ``std`` in the ``config.json`` of the saved model are computed."""

    over: Literal["evaluation", "demonstrations", "nothing"] = "evaluation"
    """``evaluation``: mean and deviation of all held-out scores. ``demonstrations``: their mean, so that they score 0 on
    average, and deviation 1. ``nothing``: neither is written."""
    demonstrations_path: str | None = None
    """Rows with a prompt and an answer; the generated world has its own."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.demonstrations_path is not None and self.over != "demonstrations":
            yield (
                "demonstrations_path",
                f"is not read: over is {self.over}; set it to demonstrations, or remove the path",
            )


class RewardOptimizerConfig(OptimizerConfig):
    """The optimizer with defaults for training all weights; an adapter needs a learning rate ten times as high."""

    learning_rate: PositiveFloat = 9e-6
    schedule: Schedule = "cosine"
    warmup_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.03
    final_fraction: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1


class RewardEngineConfig(EngineConfig):
    """An engine that always trains."""

    optimizer: RewardOptimizerConfig = RewardOptimizerConfig()


class RewardTrainingRole(RoleConfig):
    """A reward model that is trained."""

    engine: RewardEngineConfig = RewardEngineConfig()
