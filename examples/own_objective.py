"""A policy objective of your own: tapered off-policy REINFORCE (Le Roux et al. 2025).

    rlhf-ray train ppo demo-ppo algorithm.objective=examples/own_objective.py:Tapered \
        algorithm.parameters.objective.most=0.5

Good answers keep their whole gradient however far the policy has moved; what a bad answer weighs falls with the ratio and is
never above ``most``, so that the policy is not pushed without end from what it no longer says.
"""

from __future__ import annotations

import torch
from torch import Tensor


class Tapered:
    """``A log p`` where A is positive, ``sg(min(r, most)) A log p`` elsewhere."""

    def __init__(self, most: float = 1.0) -> None:
        self.most = most

    def __call__(self, log_probs: Tensor, log_ratio: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
        """What is maximised at each token, and where the bound on the ratio takes effect (for the metric clip_fraction).

        All three are float tensors of shape (N,), 0 at tokens that are not actions. ``log_probs`` carries the gradient;
        ``log_ratio`` is log p - log p_old, of the token or of its answer as ``algorithm.ratio`` says.
        """
        ratio = log_ratio.detach().exp()
        weight = torch.where(advantages > 0, torch.ones_like(ratio), ratio.clamp(max=self.most))
        return weight * advantages * log_probs, (advantages < 0) & (ratio > self.most)
