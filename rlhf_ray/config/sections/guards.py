"""The section of guards: which numbers of an update are compared with those before it, and what happens when many stand out."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rlhf_ray.config.sections.base import NonNegative, Positive, PositiveFloat, Section


class GuardsConfig(Section):
    """When an update is skipped although all its numbers are finite. NaN and Inf are always skipped."""

    loss: PositiveFloat | None = None
    """An update is skipped whose loss is more than so many robust standard deviations above the median of those before."""
    gradient_norm: PositiveFloat | None = None
    """The same of the norm of its gradient, before clipping."""
    kl_above: PositiveFloat | None = None
    """PPO: an update is skipped before which the policy is further than this from the one that sampled (nats/token, k3)."""
    window: Annotated[int, Field(ge=8)] = 64
    """How many updates the median is taken over; nothing is compared before there are half as many."""
    budget: Positive | None = None
    """How many of the last ``window`` updates may be skipped, for whatever reason, before ``on_budget`` is done."""
    on_budget: Literal["stop", "go_back"] = "stop"
    """What is done then, and after ``run.max_consecutive_skips``: end the run, or take up the weights of a commit that was
    made before the first of these skips, and go on with the next rows."""
    max_going_back: NonNegative = 3
    """How often a run goes back before it stops instead."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.budget is not None and self.budget >= self.window:
            yield (
                "budget",
                f"{self.budget} skipped updates never are among the last {self.window - 1} (window): lower it",
            )
