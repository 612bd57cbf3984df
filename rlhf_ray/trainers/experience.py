"""From sampled tokens to a batch one can learn from: rewards, reference, values, log-probs, advantages.

Always true: everything that can run at once does; a sample without a reward is never trained on: its prompt is dropped with
all its samples, or the run stops, as configured; the reward model reads the very ids that were sampled when its tokenizer
is the policy's, and text otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_ray.actors.groups import CriticGroup, PolicyGroup, ReferenceGroup
from rlhf_ray.algorithms.ppo import prepare_ppo
from rlhf_ray.config.schema import PpoConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import ScoringError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.rewards.source import RewardSource, score_or_hold
from rlhf_ray.trainers.learner import Schedules
from rlhf_ray.trajectories.batch import FinishReason, TrajectoryBatch


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt of the run: what is sampled from, and what its samples are judged by."""

    prompt_id: int
    text: str
    token_ids: tuple[int, ...]
    label: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    """The conversation that the prompt is, where it is one."""


@dataclass(frozen=True)
class TextSample:
    """One sampled answer as text."""

    prompt: str
    response: str
    label: str | None
    finished: bool
    token_ids: tuple[int, ...]
    """Prompt and response, as sampled."""
    messages: tuple[Mapping[str, str], ...] | None = None
    """The prompt's conversation with the response as its last turn, where the prompt is one."""


class Experience:
    """The forward half of a PPO step."""

    def __init__(
        self,
        config: PpoConfig,
        *,
        policy: PolicyGroup,
        critic: CriticGroup,
        reference: ReferenceGroup,
        rewards: RewardSource,
        tokenizer: Any,
        same_tokenizer: bool,
    ) -> None:
        self.config = config
        self.policy, self.critic, self.reference = policy, critic, reference
        self.rewards = rewards
        self.tokenizer = tokenizer
        self.same_tokenizer = same_tokenizer

    def gather(
        self,
        trajectories: TrajectoryBatch,
        prompts: Mapping[int, TokenizedPrompt],
        cut: Callable[[TrajectoryBatch], Schedules],
        *,
        phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
    ) -> tuple[TrajectoryBatch, Schedules, list[TextSample]]:
        """The batch with scores, reference log-probs, values and log-probs, the schedules that made them, the texts.

        The groups compute while the rewards are fetched; ``phase`` times what is waited for.
        """
        schedules = cut(trajectories)
        shared = self.policy.share(trajectories)
        pending = {
            "log_probs": self.policy.log_probs(shared, schedules.policy),
            "values": self.critic.values(shared, schedules.critic),
            "reference_log_probs": self.reference.log_probs(shared, schedules.reference),
        }
        with phase("scoring"):
            samples = self.samples(trajectories, prompts)
            results = self.score(samples)
        with phase("log_probs"):
            columns = {name: column.result() for name, column in pending.items()}
        kept = self._kept(trajectories, results)
        if len(kept) < len(trajectories):
            return self.gather(trajectories.select(kept), prompts, cut, phase=phase)
        scores = torch.tensor([result.reward for result in results], dtype=torch.float32)
        return trajectories.with_columns(**columns, score=scores), schedules, samples

    def samples(self, trajectories: TrajectoryBatch, prompts: Mapping[int, TokenizedPrompt]) -> list[TextSample]:
        """Every sampled answer as text."""
        samples = []
        offsets = trajectories.offsets.tolist()
        token_ids = trajectories["token_ids"].tolist()
        finished = (trajectories["finish_reason"] == FinishReason.STOP).tolist()
        for row, prompt_id in enumerate(trajectories["prompt_id"].tolist()):
            prompt = prompts[prompt_id]
            ids = token_ids[offsets[row] : offsets[row + 1]]
            response = self.tokenizer.decode(ids[len(prompt.token_ids) :], skip_special_tokens=True)
            said = prompt.messages and (*prompt.messages, {"role": "assistant", "content": response})
            samples.append(TextSample(prompt.text, response, prompt.label, finished[row], tuple(ids), said))
        return samples

    def score(self, samples: Sequence[TextSample]) -> list[ScoreResult]:
        """One result a sample; what fails is tried again while the reward's ``hold_s`` lasts."""
        return score_or_hold(self.rewards, self.requests(samples), samples, hold_s=self.config.reward.hold_s)

    def rewards_of(self, samples: Sequence[TextSample]) -> list[float]:
        """The reward of every sample; raises :class:`ScoringError` where one has none."""
        results = self.score(samples)
        failed = [result.error for result in results if result.error is not None]
        if failed:
            raise ScoringError(f"no reward for {len(failed)} of {len(samples)} samples, such as: {failed[0]}")
        return [float(result.reward) for result in results if result.reward is not None]

    def requests(self, samples: Sequence[TextSample]) -> list[ScoreRequest]:
        """Ids as sampled where both tokenizers are the same, the prompt and response as text where they are not."""
        if self.same_tokenizer:
            return [ScoreRequest(token_ids=sample.token_ids) for sample in samples]
        return [
            ScoreRequest(messages=sample.messages)
            if sample.messages is not None
            else ScoreRequest(prompt=sample.prompt, response=sample.response)
            for sample in samples
        ]

    def _kept(self, trajectories: TrajectoryBatch, results: Sequence[ScoreResult]) -> list[int]:
        """Rows of prompts whose samples all have a reward."""
        prompt_ids = trajectories["prompt_id"].tolist()
        failed = {prompt_ids[row]: result.error for row, result in enumerate(results) if result.error is not None}
        if not failed:
            return list(range(len(results)))
        prompt_id, cause = next(iter(failed.items()))
        told = f"no reward for {len(failed)} prompts after {self.config.reward.hold_s:g} s, such as prompt {prompt_id}: {cause}"
        kept = [row for row, prompt_id in enumerate(prompt_ids) if prompt_id not in failed]
        if self.config.reward.on_failure == "stop" or not kept:
            raise ScoringError(f"{told}; mend the reward source, or set reward.on_failure to drop")
        get_logger("ppo").warning("%s; dropped with all their samples", told)
        return kept

    def advantages(self, batch: TrajectoryBatch, kl_coefficient: float) -> tuple[TrajectoryBatch, dict[str, float]]:
        """The batch with token rewards, advantages and returns; the objective's metrics."""
        algorithm = self.config.algorithm
        return prepare_ppo(
            batch,
            kl_coefficient=kl_coefficient,
            kl_estimator=algorithm.kl.estimator,
            gamma=algorithm.gamma,
            lam=algorithm.lam,
            whiten_advantages=algorithm.whiten_advantages,
            reward_clip=self.config.reward.clip,
            missing_eos_penalty=algorithm.missing_eos_penalty,
        )
