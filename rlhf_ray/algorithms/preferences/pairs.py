"""Losses of a policy on preference pairs: DPO and its conservative form, IPO, SimPO, and length-normalised DPO.

Each is a link, one number per pair, of the difference ``D`` of the implicit rewards of both answers (``rewards.py``).

Invariants: everything that :mod:`rlhf_ray.algorithms.losses` says of a loss holds. A link and its gradient are finite at every
finite difference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from rlhf_ray.algorithms.denominators import DenominatorKind
from rlhf_ray.algorithms.losses import LossOutput, PolicyOutputs, metric, read_entropy
from rlhf_ray.algorithms.preferences.rewards import ImplicitReward, answer_log_probs
from rlhf_ray.algorithms.reward_losses import find_decided_pairs, pair_metrics, split_sides
from rlhf_ray.trajectories.batch import TrajectoryBatch


@runtime_checkable
class Link(Protocol):
    """The loss of a pair, from the difference of its implicit rewards."""

    def __call__(self, difference: Float[Tensor, "P"]) -> Float[Tensor, "P"]: ...


@dataclass(frozen=True)
class Logistic:
    """``-(1 - e) log sigmoid(D - m) - e log sigmoid(m - D)``.

    With neither e nor m it is DPO (Rafailov et al. 2023, eq. 7). ``label_smoothing`` e is the probability that a label is wrong
    (Mitchell 2023, conservative DPO). ``target_margin`` m is SimPO's gamma (Meng et al. 2024, eq. 6).
    """

    label_smoothing: float = 0.0
    target_margin: float = 0.0

    def __call__(self, difference: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
        past_margin = difference - self.target_margin
        loss = -F.logsigmoid(past_margin)
        if self.label_smoothing:
            loss = (1.0 - self.label_smoothing) * loss - self.label_smoothing * F.logsigmoid(-past_margin)
        return loss


@dataclass(frozen=True)
class Squared:
    """IPO: ``(D / beta - 1 / (2 beta))^2`` (Azar et al. 2023, eq. 17, whose tau is ``beta``)."""

    beta: float

    def __call__(self, difference: Float[Tensor, "P"]) -> Float[Tensor, "P"]:
        return ((difference - 0.5) / self.beta).square()


@dataclass(frozen=True)
class PolicyPairLoss:
    """``link(r_chosen - r_rejected)``, pair by pair: sequence 2i is the chosen side and 2i+1 the rejected one.

    Needs the column ``action_mask``, and ``reference_log_prob`` where the reward has a reference. Raises ``ValueError`` where
    sequences are not whole pairs.
    """

    link: Link
    reward: ImplicitReward

    denominator: ClassVar[DenominatorKind] = "pairs"

    def __call__(self, outputs: PolicyOutputs, micro_batch: TrajectoryBatch) -> LossOutput:
        """Sum the loss over the pairs of the micro-batch."""
        log_prob = answer_log_probs(outputs.log_probs, micro_batch)
        chosen, rejected = split_sides(self.reward(log_prob, micro_batch), micro_batch)
        loss = self.per_pair(chosen - rejected, micro_batch).sum()
        metrics = pair_metrics(chosen.detach(), rejected.detach(), find_decided_pairs(micro_batch))
        pairs = metrics["reward/chosen"][1]
        metrics["loss/dpo"] = metric(loss, pairs)
        for side, sums in zip(("chosen", "rejected"), split_sides(log_prob, micro_batch), strict=True):
            metrics[f"log_prob/{side}"] = metric(sums.sum(), pairs)
        mask = micro_batch["action_mask"]
        entropy = read_entropy(outputs, mask)
        if entropy is not None:
            metrics["entropy"] = metric(entropy.sum(), mask.sum())
        return LossOutput(loss, metrics)

    def per_pair(self, difference: Float[Tensor, "P"], batch: TrajectoryBatch) -> Float[Tensor, "P"]:
        """Return the loss of each pair of ``batch``, given the difference of its implicit rewards."""
        return self.link(difference)
