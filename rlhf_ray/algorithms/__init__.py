"""The mathematics: advantages, KL, losses, reward shaping, as pure functions on ragged tensors.

Always true: nothing here does I/O, knows a config object or changes its inputs, and a token outside the action mask
has no influence on anything, even where NaN stands there.
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
