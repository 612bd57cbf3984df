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
        "FixedKl": ".kl",
        "LossOutput": ".losses",
        "NegativeLogLikelihood": ".losses",
        "PolicyLoss": ".losses",
        "PolicyOutputs": ".losses",
        "RewardLoss": ".reward_losses",
        "RewardOutputs": ".reward_losses",
        "ValueLoss": ".losses",
        "denominator": ".denominators",
        "gae": ".advantages",
        "kl_controller": ".kl",
        "kl_k1": ".kl",
        "kl_k2": ".kl",
        "kl_k3": ".kl",
        "masked_mean": ".masked",
        "masked_sum": ".masked",
        "missing_eos": ".rewards",
        "place_scores": ".rewards",
        "prepare_ppo": ".ppo",
        "segment_sum": ".masked",
        "sequence_kl": ".kl",
        "shape_rewards": ".rewards",
        "whiten": ".masked",
    },
)
