"""The loss of reward models: a ranking of each pair, with label smoothing, centring and the balance of routers.

Invariants:

- Everything that :mod:`rlhf_ray.algorithms.losses` says of a loss holds, with one exception: the balance of routers is by
  its nature a mean over a micro-batch, so it depends on how a batch is split.
- Scores are compared in float32 or wider.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ray.algorithms.denominators import DenominatorKind
from rlhf_ray.algorithms.losses import LossOutput, Metrics, metric
from rlhf_ray.algorithms.masked import expect_shape
from rlhf_ray.algorithms.rankings import Ranking, Sigmoid
from rlhf_ray.trajectories.batch import TrajectoryBatch


@dataclass(frozen=True)
class RewardOutputs:
    """The score of each sequence, and for a mixture of experts how evenly its routers used them."""

    scores: Float[Tensor, "B"]
    router_balance: Float[Tensor, ""] | None = None


@dataclass(frozen=True)
class RewardLoss:
    """``(1 - e) ranking(d) + e ranking(-d) + centering (r_c + r_r)^2 + router_balance balance``, pair by pair.

    Sequence 2i is the chosen side and 2i+1 the rejected one; ``d`` is the difference of their scores. The column that the
    ranking reads is taken at the chosen side. ``label_smoothing`` e is the probability that a label is wrong (Mitchell 2023,
    conservative DPO). ``centering`` keeps scores near zero (Eisenstein et al. 2023, eq. 2). Raises ``ValueError`` where
    sequences are not whole pairs, and where ``router_balance`` is set for a model without routers.
    """

    ranking: Ranking = field(default_factory=Sigmoid)
    label_smoothing: float = 0.0
    centering: float = 0.0
    router_balance: float = 0.0

    denominator: ClassVar[DenominatorKind] = "pairs"

    def __call__(self, outputs: RewardOutputs | Float[Tensor, "B"], micro_batch: TrajectoryBatch) -> LossOutput:
        """Sum the loss over the pairs of the micro-batch."""
        outputs = outputs if isinstance(outputs, RewardOutputs) else RewardOutputs(outputs)
        chosen, rejected = split_sides(outputs.scores, micro_batch)
        ranking = self.per_pair(chosen - rejected, micro_batch).sum()
        metrics = pair_metrics(chosen.detach(), rejected.detach(), find_decided_pairs(micro_batch))
        pairs = metrics["reward/chosen"][1]
        metrics["loss/rm"] = metric(ranking, pairs)
        loss = ranking
        if self.centering:
            centering = (chosen + rejected).square().sum()
            loss = loss + self.centering * centering
            metrics["loss/centering"] = (centering.detach(), pairs)
        if self.router_balance:
            if outputs.router_balance is None:
                raise ValueError("router_balance is set, but the model has no routers: leave it at 0")
            balance = outputs.router_balance * pairs
            loss = loss + self.router_balance * balance
            metrics["loss/router_balance"] = (balance.detach(), pairs)
        return LossOutput(loss, metrics)

    def per_pair(self, difference: Float[Tensor, "P"], batch: TrajectoryBatch) -> Float[Tensor, "P"]:
        """Return the ranking loss of each pair, with label smoothing and without the other terms."""
        reads = self.ranking.reads
        number = batch[reads][0::2].to(difference) if reads in batch else None
        loss = self.ranking(difference, number)
        if self.label_smoothing:
            loss = (1.0 - self.label_smoothing) * loss + self.label_smoothing * self.ranking(-difference, number)
        return loss


def split_sides(scores: Float[Tensor, "B"], batch: TrajectoryBatch) -> tuple[Float[Tensor, "P"], Float[Tensor, "P"]]:
    """Return the scores of the chosen and of the rejected sequences, in float32 or wider."""
    expect_shape("scores of the reward model", scores, (len(batch),))
    if len(batch) % 2:
        raise ValueError(f"{len(batch)} sequences are not whole pairs: chosen is 2i, rejected 2i+1")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    return scores[0::2], scores[1::2]


def find_decided_pairs(batch: TrajectoryBatch) -> Bool[Tensor, "P"]:
    """Mark the pairs that have a better side: all but ties, whose grade is 0."""
    if "grade" in batch:
        return batch["grade"][0::2] != 0
    return torch.ones(len(batch) // 2, dtype=torch.bool, device=batch.device)


def router_balance(logits: Sequence[Float[Tensor, "tokens experts"]], top_k: int) -> Float[Tensor, ""]:
    """Measure how unevenly tokens went to experts: ``experts * sum_e f_e P_e``, which is ``top_k`` where it was even.

    ``logits`` holds one tensor per layer. f_e is how often a token went to expert e on average, and P_e the mean probability
    that the router gave it, both over all layers (Fedus et al. 2021, eq. 4-6, with top_k choices per token as in transformers).
    """
    probabilities = torch.cat([layer.float() for layer in logits]).softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k, dim=-1).indices, 1.0)
    return probabilities.shape[1] * (chosen.mean(0) * probabilities.mean(0)).sum()


def pair_metrics(chosen: Float[Tensor, "P"], rejected: Float[Tensor, "P"], decided: Bool[Tensor, "P"]) -> Metrics:
    """Sum what is logged of the scores of pairs; accuracy and margin count only the ``decided`` ones, since others are ties."""
    difference = chosen - rejected
    pairs = torch.full_like(difference.sum(), len(chosen))
    count = decided.sum().to(pairs)
    right, even = ((found & decided).sum() for found in (difference > 0, difference == 0))
    return {
        "accuracy": (right + 0.5 * even, count),
        "margin": (torch.where(decided, difference, 0.0).sum(), count),
        "reward/chosen": (chosen.sum(), pairs),
        "reward/rejected": (rejected.sum(), pairs),
    }
