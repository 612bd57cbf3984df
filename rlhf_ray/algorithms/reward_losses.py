"""The losses of reward models, each a sum over the pairs of one micro-batch.

Always true: what holds of every loss (:mod:`rlhf_ray.algorithms.losses`); and scores are compared in float32 at least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from rlhf_ray.algorithms.denominators import DenominatorKind
from rlhf_ray.algorithms.losses import LossOutput
from rlhf_ray.algorithms.masked import expect_shape

if TYPE_CHECKING:
    from rlhf_ray.trajectories.batch import TrajectoryBatch


@dataclass(frozen=True)
class BradleyTerry:
    """Pairwise ranking: ``-log sigmoid(r_chosen - r_rejected - margin)`` (Bradley and Terry 1952; Ouyang et al. 2022).

    Sequence 2i is chosen, 2i+1 rejected; an optional per-sequence column ``margin`` is read at the chosen side.
    ``centering`` adds ``centering * (r_chosen + r_rejected)^2`` (Eisenstein et al. 2023, eq. 2).
    """

    centering: float = 0.0

    denominator: ClassVar[DenominatorKind] = "pairs"

    def __call__(self, outputs: Float[Tensor, "B"], micro_batch: TrajectoryBatch) -> LossOutput:
        """Sum over the pairs of the micro-batch."""
        expect_shape("scores of the reward model", outputs, (len(micro_batch),))
        if len(micro_batch) % 2:
            raise ValueError(f"{len(micro_batch)} sequences are not whole pairs: chosen is 2i, rejected 2i+1")
        scores = outputs.to(torch.promote_types(outputs.dtype, torch.float32))
        chosen, rejected = scores[0::2], scores[1::2]
        difference = chosen - rejected
        shifted = difference - _margins(micro_batch, difference)
        ranking = -F.logsigmoid(shifted).sum()
        loss = ranking
        if self.centering:
            loss = loss + self.centering * (chosen + rejected).square().sum()
        difference, chosen, rejected = difference.detach(), chosen.detach(), rejected.detach()
        pairs = torch.full_like(ranking.detach(), len(difference))
        metrics = {
            "loss/rm": (ranking.detach(), pairs),
            "accuracy": ((difference > 0).sum() + 0.5 * (difference == 0).sum(), pairs),
            "margin": (difference.sum(), pairs),
            "reward/chosen": (chosen.sum(), pairs),
            "reward/rejected": (rejected.sum(), pairs),
        }
        return LossOutput(loss, metrics)


def _margins(micro_batch: TrajectoryBatch, like: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
    if "margin" not in micro_batch:
        return torch.zeros_like(like)
    return micro_batch["margin"][0::2].to(like.dtype)
