"""The loss of reward models, a sum over the pairs of one micro-batch.

Always true: what holds of every loss (:mod:`rlhf_ray.algorithms.losses`), except that the balance of routers is a mean
over a micro-batch by nature, so that it depends on the split; and scores are compared in float32 at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ray.algorithms.denominators import DenominatorKind
from rlhf_ray.algorithms.losses import LossOutput, Metrics
from rlhf_ray.algorithms.masked import expect_shape
from rlhf_ray.algorithms.rankings import Ranking, Sigmoid
from rlhf_ray.trajectories.batch import TrajectoryBatch


@dataclass(frozen=True)
class RewardOutputs:
    """What a reward model says of each sequence, and how evenly its routers used their experts, where it has some."""

    scores: Float[Tensor, "B"]
    router_balance: Float[Tensor, ""] | None = None


@dataclass(frozen=True)
class RewardLoss:
    """``(1 - e) ranking(d) + e ranking(-d) + centering (r_c + r_r)^2 + router_balance balance``, pair by pair.

    Sequence 2i is chosen, 2i+1 rejected, ``d`` the difference of their scores; the column that the ranking reads is read
    at the chosen side. ``label_smoothing`` e is the odds that a label is wrong (Mitchell 2023, conservative DPO).
    ``centering`` holds scores near zero (Eisenstein et al. 2023, eq. 2).
    """

    ranking: Ranking = field(default_factory=Sigmoid)
    label_smoothing: float = 0.0
    centering: float = 0.0
    router_balance: float = 0.0

    denominator: ClassVar[DenominatorKind] = "pairs"

    def __call__(self, outputs: RewardOutputs | Float[Tensor, "B"], micro_batch: TrajectoryBatch) -> LossOutput:
        """Sum over the pairs of the micro-batch."""
        said = outputs if isinstance(outputs, RewardOutputs) else RewardOutputs(outputs)
        chosen, rejected = sides(said.scores, micro_batch)
        ranking = self.per_pair(chosen - rejected, micro_batch).sum()
        metrics = _metrics(ranking, chosen.detach(), rejected.detach(), decided(micro_batch))
        pairs = metrics["loss/rm"][1]
        loss = ranking
        if self.centering:
            centering = (chosen + rejected).square().sum()
            loss = loss + self.centering * centering
            metrics["loss/centering"] = (centering.detach(), pairs)
        if self.router_balance:
            if said.router_balance is None:
                raise ValueError("router_balance is set, but the model has no routers: leave it at 0")
            balance = said.router_balance * pairs
            loss = loss + self.router_balance * balance
            metrics["loss/router_balance"] = (balance.detach(), pairs)
        return LossOutput(loss, metrics)

    def per_pair(self, difference: Float[Tensor, "P"], batch: TrajectoryBatch) -> Float[Tensor, "P"]:
        """The ranking loss of each pair, with label smoothing, without regularisers."""
        reads = self.ranking.reads
        number = batch[reads][0::2].to(difference) if reads in batch else None
        loss = self.ranking(difference, number)
        if self.label_smoothing:
            loss = (1.0 - self.label_smoothing) * loss + self.label_smoothing * self.ranking(-difference, number)
        return loss


def sides(scores: Float[Tensor, "B"], batch: TrajectoryBatch) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
    """The scores of the chosen and of the rejected sequences, in float32 or better."""
    expect_shape("scores of the reward model", scores, (len(batch),))
    if len(batch) % 2:
        raise ValueError(f"{len(batch)} sequences are not whole pairs: chosen is 2i, rejected 2i+1")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores[0::2], scores[1::2]


def decided(batch: TrajectoryBatch) -> Bool[Tensor, "P"]:
    """Which pairs have a better side: all but those of grade 0."""
    if "grade" in batch:
        return batch["grade"][0::2] != 0
    return torch.ones(len(batch) // 2, dtype=torch.bool, device=batch.device)


def router_balance(logits: Sequence[Float[Tensor, "tokens experts"]], top_k: int) -> Float[Tensor, ""]:
    """``experts * sum_e f_e P_e``: how unevenly tokens went to experts, 1 times ``top_k`` where it was even.

    f_e is the mean number of times that a token went to expert e, P_e the mean probability that its router gave it, over
    all layers (Fedus et al. 2021, eq. 4-6, with top_k choices a token as in transformers).
    """
    probabilities = torch.cat([layer.float() for layer in logits]).softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k, dim=-1).indices, 1.0)
    return probabilities.shape[1] * (chosen.mean(0) * probabilities.mean(0)).sum()


def _metrics(ranking: Tensor, chosen: Tensor, rejected: Tensor, decided: Tensor) -> Metrics:
    """``decided`` pairs have a better side; the others are ties, which no accuracy or margin counts."""
    difference = (chosen - rejected)[decided]
    pairs = torch.full_like(ranking.detach(), len(chosen))
    count = torch.full_like(pairs, len(difference))
    return {
        "loss/rm": (ranking.detach(), pairs),
        "accuracy": ((difference > 0).sum() + 0.5 * (difference == 0).sum(), count),
        "margin": (difference.sum(), count),
        "reward/chosen": (chosen.sum(), pairs),
        "reward/rejected": (rejected.sum(), pairs),
    }
