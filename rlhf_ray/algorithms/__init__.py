"""The mathematics of RLHF as pure functions on tensors: advantages, KL, losses, reward shaping.

Shapes: N is the number of tokens of all sequences, B the number of sequences, A the number of actions, P the number of
preference pairs. ``offsets`` has B + 1 entries and cuts the N tokens into sequences; where an annotation meets it before B
its length is called ``cuts``, and B is ``cuts-1``. An action is a token that the policy sampled.

Invariants:

- Nothing here does I/O, knows a config object or changes its inputs; only ``user_parts`` loads code that a user names.
- A token outside the action mask has no influence on any result, even where NaN stands there.
"""

from __future__ import annotations

from rlhf_ray.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "AdaptiveKl": ".kl",
        "AgainstGroup": ".advantages",
        "Cispo": ".policy_loss",
        "Clipped": ".policy_loss",
        "FixedKl": ".kl",
        "Gae": ".advantages",
        "ImportanceCorrection": ".importance",
        "KlTerm": ".policy_loss",
        "LossOutput": ".losses",
        "MissingEos": ".shaping",
        "NegativeLogLikelihood": ".losses",
        "Overlong": ".shaping",
        "PolicyLoss": ".policy_loss",
        "PolicyOutputs": ".losses",
        "RewardLoss": ".reward_losses",
        "RewardOutputs": ".reward_losses",
        "Preparation": ".preparation",
        "RewardShaping": ".shaping",
        "RewardToGo": ".advantages",
        "RunningMoments": ".moments",
        "TooShort": ".shaping",
        "ValueLoss": ".losses",
        "denominator": ".denominators",
        "gae": ".advantages",
        "group_baseline": ".group_baselines",
        "kl_controller": ".kl",
        "kl_k1": ".kl",
        "kl_k2": ".kl",
        "kl_k3": ".kl",
        "kl_loss": ".kl",
        "masked_mean": ".masked",
        "masked_sum": ".masked",
        "place_scores": ".token_rewards",
        "reward_to_go": ".advantages",
        "segment_sum": ".masked",
        "sequence_kl": ".kl",
        "make_token_rewards": ".token_rewards",
        "whiten": ".masked",
    },
)
