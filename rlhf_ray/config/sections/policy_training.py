"""The ``loss`` section of a policy's training on preferences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

from rlhf_ray.config.sections.base import NonNegativeFloat, PositiveFloat, Section
from rlhf_ray.config.sections.reward_training import Odds

PolicyLossName = Literal["sigmoid", "ipo", "simpo", "kto"]
BETAS: Mapping[str, float] = {"sigmoid": 0.1, "ipo": 0.1, "simpo": 2.0, "kto": 0.1}
"""What ``beta`` is by default: that of the papers, of SimPO the smallest."""

READ_BY: Mapping[str, Sequence[str]] = {
    "label_smoothing": ("sigmoid", "simpo"),
    "simpo_gamma": ("simpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
}
"""The losses that read a key."""


class PolicyLossConfig(Section):
    """The loss on log-probabilities of answers; docs/dpo.md gives the formula of each name."""

    name: PolicyLossName = "sigmoid"
    """``sigmoid`` is DPO; ``kto`` reads single answers with labels, the others read pairs."""
    beta: PositiveFloat | None = None
    """How strongly the policy is held to the reference; null: 0.1, or 2.0 for ``simpo``, which has none."""
    label_smoothing: Odds = 0.0
    """The probability that a label is wrong (conservative DPO)."""
    length_normalised: bool | None = None
    """Whether the log-probability of an answer is divided by its tokens; null: of ``ipo`` and ``simpo``, not of others."""
    simpo_gamma: NonNegativeFloat = 1.0
    """By how much the reward of the chosen answer should be the higher one, for the loss ``simpo``."""
    desirable_weight: PositiveFloat = 1.0
    """What a desirable answer counts, for the loss ``kto``."""
    undesirable_weight: PositiveFloat = 1.0

    @property
    def strength(self) -> float:
        """``beta``, or its default."""
        return BETAS[self.name] if self.beta is None else self.beta

    @property
    def is_normalised(self) -> bool:
        """``length_normalised``, or its default."""
        return self.name in ("ipo", "simpo") if self.length_normalised is None else self.length_normalised

    @property
    def reads_pairs(self) -> bool:
        """Whether it reads pairs; else single answers with labels."""
        return self.name != "kto"

    @property
    def reads_reference(self) -> bool:
        """Whether it compares with the model that training starts from."""
        return self.name != "simpo"

    def conflicts(self) -> Iterator[tuple[str, str]]:
        for key, names in READ_BY.items():
            if self.name not in names and not self.is_default(key):
                losses = f"the loss{'es' if len(names) > 1 else ''} {' and '.join(names)}"
                yield key, f"{getattr(self, key)} belongs to {losses}, but name is {self.name}: remove it"
        if self.length_normalised is False and self.name == "simpo":
            yield "length_normalised", "SimPO divides by the length of an answer by definition: remove it"
        if self.length_normalised and self.name == "kto":
            yield "length_normalised", "KTO compares sums of log-probabilities by definition: remove it"
