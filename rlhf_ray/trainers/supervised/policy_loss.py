"""Build the loss of a policy on preferences that the config names.

Invariant: this is the only place that turns the keys of the section ``loss`` of a ``dpo`` job into parts.
"""

from __future__ import annotations

from rlhf_ray.algorithms.preferences.pairs import Link, Logistic, PolicyPairLoss, Squared
from rlhf_ray.algorithms.preferences.rewards import ImplicitReward
from rlhf_ray.algorithms.preferences.unpaired import KtoLoss
from rlhf_ray.config.sections.policy_training import PolicyLossConfig


def make_pair_loss(config: PolicyLossConfig) -> PolicyPairLoss:
    """The loss on preference pairs."""
    beta = config.strength
    links: dict[str, Link] = {
        "sigmoid": Logistic(config.label_smoothing),
        "simpo": Logistic(config.label_smoothing, config.simpo_gamma),
        "ipo": Squared(beta),
    }
    return PolicyPairLoss(
        links[config.name], ImplicitReward(beta, config.is_normalised, reference=config.reads_reference)
    )


def make_answer_loss(config: PolicyLossConfig) -> KtoLoss:
    """The loss on single answers with labels."""
    return KtoLoss(config.strength, config.desirable_weight, config.undesirable_weight)
