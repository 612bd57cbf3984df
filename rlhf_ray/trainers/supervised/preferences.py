"""What a policy's training on preferences does with its examples: pairs, or single answers with labels.

Invariants: the log-probs of the reference are those of the policy before its first update. Every figure on held-out rows is
computed here on the driver, over all of them at once. The reference point of KTO is measured over the answers of an update,
with the weights that the update starts from.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from rlhf_ray.actors.groups import PolicyGroup, SharedBatch
from rlhf_ray.algorithms.preferences.rewards import kl_baseline
from rlhf_ray.config.jobs.dpo import DpoConfig
from rlhf_ray.console import get_logger
from rlhf_ray.data.batches import (
    JudgedExample,
    make_both_answers_batch,
    make_judged_batch,
    make_other_answers_batch,
    make_policy_pair_batch,
)
from rlhf_ray.data.encoded_pairs import PairExample
from rlhf_ray.data.load import load_judged, load_pairs
from rlhf_ray.data.split import Split
from rlhf_ray.evaluation.preferences import ranking_accuracy
from rlhf_ray.monitoring.report.summary import PreferencePage
from rlhf_ray.trainers.supervised.loop import SummedLoss, Task
from rlhf_ray.trainers.supervised.policy_loss import make_answer_loss, make_pair_loss
from rlhf_ray.trainers.supervised.reference import EXAMPLES_PER_CALL, Reference, measure, sum_log_probs
from rlhf_ray.trainers.supervised.reward_evaluation import HeldOutPairs
from rlhf_ray.trajectories.schedule import Schedule


class Preferences(ABC):
    """The examples of a run, and what is asked of the policy about them."""

    def __init__(self, config: DpoConfig) -> None:
        self.config = config
        self.max_tokens = config.policy.forward_tokens(config.batch)

    @abstractmethod
    def task(self) -> Task:
        """What the run trains on."""

    @abstractmethod
    def begin(self, policy: PolicyGroup) -> None:
        """Ask the policy, which has its first weights, for what is needed of the reference."""

    @abstractmethod
    def figures(self) -> dict[str, float]:
        """Figures of the policy as it is now on held-out rows, by their metric names; empty where none are held out."""

    def page(self, tokenizer: Any) -> PreferencePage | None:
        """What the report shows of the last figures, if there is anything to show."""
        return None

    def _reference(self, policy: PolicyGroup) -> Reference:
        return Reference(policy, self.config.policy.model, self.max_tokens, self.config.data.cache)


class Pairs(Preferences):
    """Preference pairs, for DPO, IPO and SimPO."""

    def __init__(self, config: DpoConfig, tokenizer: Any) -> None:
        super().__init__(config)
        self.examples: Split[PairExample] = load_pairs(config.data, tokenizer, config.run.seed, graded=False)
        self.loss = make_pair_loss(config.loss)
        self._held_out: HeldOutPairs | None = None

    def task(self) -> Task:
        examples, per_update = self.examples, self.config.batch.per_update
        return Task(
            examples.train, make_policy_pair_batch, self.loss, per_update, examples.parts, self.config.epochs, unit=2
        )

    def begin(self, policy: PolicyGroup) -> None:
        examples = self.examples
        if self.loss.reward.reference:
            reference = self._reference(policy)
            for half in (examples.train, examples.held_out):
                half[:] = [
                    replace(pair, reference=log_probs)
                    for pair, log_probs in zip(half, reference.log_probs(half, make_policy_pair_batch), strict=True)
                ]
        if examples.held_out:

            def score(shared: SharedBatch, schedule: Schedule) -> torch.Tensor:
                return self.loss.reward(sum_log_probs(policy, shared, schedule), shared.batch)

            self._held_out = HeldOutPairs(
                policy, examples.held_out, self.loss, self.max_tokens, make_batch=make_policy_pair_batch, score=score
            )

    def figures(self) -> dict[str, float]:
        return {} if self._held_out is None else self._held_out.figures()

    def page(self, tokenizer: Any) -> PreferencePage | None:
        if self._held_out is None:
            return None
        return self._held_out.page(tokenizer, self.config.evaluation.worst_pairs, None)


class JudgedAnswers(Preferences):
    """Single answers with labels, for KTO."""

    def __init__(self, config: DpoConfig, tokenizer: Any) -> None:
        super().__init__(config)
        self.examples: Split[JudgedExample] = load_judged(config.data, tokenizer, config.run.seed)
        self.loss = make_answer_loss(config.loss)
        self._say_how_labels_weigh()
        self._policy: PolicyGroup | None = None

    def task(self) -> Task:
        examples, per_update = self.examples, self.config.batch.per_update
        return Task(
            examples.train, make_judged_batch, self.loss, per_update, examples.parts, self.config.epochs,
            loss_now=self.loss_now,
        )  # fmt: skip

    def begin(self, policy: PolicyGroup) -> None:
        self._policy = policy
        reference = self._reference(policy)
        for half in (self.examples.train, self.examples.held_out):
            half[:] = [
                replace(example, reference=log_probs)
                for example, log_probs in zip(half, reference.log_probs(half, make_both_answers_batch), strict=True)
            ]

    def loss_now(self, examples: Sequence[JudgedExample]) -> SummedLoss:
        """The loss with the reference point of these examples."""
        assert self._policy is not None, "call begin() before the first update"
        now = measure(self._policy, make_other_answers_batch(examples), self.max_tokens, unit=1)
        return replace(self.loss, baseline=kl_baseline(now - _references(examples)[1::2].to(now)))

    def figures(self) -> dict[str, float]:
        examples = self.examples.held_out
        if not examples:
            return {}
        assert self._policy is not None, "call begin() before the first evaluation"
        sums = torch.cat(
            [
                measure(
                    self._policy,
                    make_both_answers_batch(examples[start : start + EXAMPLES_PER_CALL]),
                    self.max_tokens,
                    unit=2,
                )
                for start in range(0, len(examples), EXAMPLES_PER_CALL)
            ]
        ).double()
        ratios = sums - _references(examples)
        loss = replace(self.loss, baseline=kl_baseline(ratios[1::2]))
        rewards = loss.beta * ratios[0::2]
        desirable = torch.tensor([example.desirable for example in examples])
        figures = {
            "evaluation/answers": float(len(examples)),
            "evaluation/loss": float(loss.per_answer(rewards, desirable).mean()),
            "evaluation/kl_baseline": loss.baseline,
            **{
                f"evaluation/{name}_mean": float(rewards[kind].mean())
                for name, kind in (("chosen", desirable), ("rejected", ~desirable))
                if kind.any()
            },
        }
        if desirable.any() and not desirable.all():
            figures["evaluation/accuracy"] = ranking_accuracy(rewards[desirable].numpy(), rewards[~desirable].numpy())
        return figures

    def _say_how_labels_weigh(self) -> None:
        """Warn where desirable answers together weigh less than undesirable ones, or over 4/3 as much (Ethayarajh et al. 2024,
        eq. 9).
        """
        loss, train = self.loss, self.examples.train
        desirable = sum(example.desirable for example in train)
        ratio = loss.desirable_weight * desirable / (loss.undesirable_weight * (len(train) - desirable))
        if not 0.999 < ratio < 4 / 3 + 0.001:
            get_logger("data").warning(
                "%d of %d answers are desirable: together they weigh %.2f times as much as the others, and 1 to 1.33 is usual: "
                "set loss.desirable_weight to %.3g", desirable, len(train), ratio, loss.desirable_weight / ratio,
            )  # fmt: skip


def _references(examples: Sequence[JudgedExample]) -> torch.Tensor:
    """(2B,) the log-probs of both answers of each example under the reference."""
    return torch.tensor([number for one in examples for number in one.reference or ()], dtype=torch.float64)
