"""The ``loss`` section of a distillation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rlhf_ray.config.sections.base import Fraction, PositiveFloat, Section


class DistillationConfig(Section):
    """How far the policy's distribution of a token is from the teacher's; docs/distill.md gives the formulas."""

    name: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    beta: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """The weight of the teacher in the mean distribution of ``jsd``."""
    temperature: PositiveFloat = 1.0
    """What the logits of both are divided by."""
    likelihood: Fraction = 0.0
    """The share of the loss of supervised fine-tuning, on the tokens of the answers themselves."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.name != "jsd" and not self.is_default("beta"):
            yield "beta", f"{self.beta:g} belongs to the loss jsd, but name is {self.name}: remove it"
        if self.likelihood == 1.0:
            yield "likelihood", "1 leaves nothing of the teacher: lower it, or use train sft"
