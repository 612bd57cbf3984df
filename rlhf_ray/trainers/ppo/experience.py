"""Turn sampled tokens into a batch to learn from: rewards, log-probs, reference log-probs, values and advantages.

Invariants: the groups compute while rewards are fetched. A sample without a reward is never trained on: as configured, its
prompt is dropped with all its samples, or the run stops. The schedule is made once a step, right after the rollout, and
made again only when prompts were dropped.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch

from rlhf_ray.algorithms.masked import segment_sum
from rlhf_ray.algorithms.moments import RunningMoments
from rlhf_ray.algorithms.preparation import Preparation
from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.console import get_logger
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.errors import RequestError, ScoringError
from rlhf_ray.processes import spans
from rlhf_ray.rewards.mixture import MixedResult
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample, text_sample
from rlhf_ray.rewards.source import RewardSource, score_or_hold
from rlhf_ray.rewards.steps.placement import SteppedResult, step_tokens
from rlhf_ray.trainers.ppo.roles import Groups, Schedules
from rlhf_ray.trajectories.batch import FinishReason, TrajectoryBatch
from rlhf_ray.trajectories.columns import ROUTED


@dataclass(frozen=True)
class ScoredSamples:
    """Answers as text, and the result of the reward source for each."""

    samples: list[TextSample]
    results: list[ScoreResult]

    def select(self, rows: Sequence[int]) -> ScoredSamples:
        """The answers at these positions, in this order."""
        return ScoredSamples([self.samples[row] for row in rows], [self.results[row] for row in rows])

    @staticmethod
    def join(parts: Sequence[ScoredSamples]) -> ScoredSamples:
        """All parts, one after the other."""
        return ScoredSamples(
            [sample for part in parts for sample in part.samples],
            [result for part in parts for result in part.results],
        )


TERM = "term_"
"""Prefix of the columns that hold the rewards of a mixture's terms."""


def score_columns(results: Sequence[ScoreResult]) -> dict[str, list[float]]:
    """The column ``score``, and for a mixture a column for each of its terms; every result must have a reward."""
    columns = {"score": [float(result.reward) for result in results if result.reward is not None]}
    for result in results:
        if isinstance(result, MixedResult) and result.terms is not None:
            for name, reward in result.terms.items():
                columns.setdefault(f"{TERM}{name}", []).append(reward)
    return columns


def episode_outcomes(trajectories: TrajectoryBatch) -> list[dict[str, Any]]:
    """What the environment of each episode made of it, as fields of its sample; nothing where there is no environment."""
    if "turn_rewards" not in trajectories:
        return [{}] * len(trajectories)
    totals = segment_sum(trajectories["turn_rewards"], trajectories.offsets).tolist()
    failures = trajectories["episode_failure"].tolist()
    return [
        {"episode_reward": None if failure else total, "episode_failure": failure}
        for total, failure in zip(totals, failures, strict=True)
    ]


class Experience:
    """The half of a PPO step that computes what to learn from; it changes no weight."""

    def __init__(
        self,
        config: PpoConfig,
        *,
        groups: Groups,
        preparation: Preparation,
        rewards: RewardSource,
        tokenizer: Any,
        stop_tokens: Collection[int] = (),
    ) -> None:
        """``stop_tokens`` are the ids that end an answer; they are no part of its text."""
        self.config = config
        self.groups = groups
        self.preparation = preparation
        self.rewards = rewards
        self.tokenizer = tokenizer
        self.stop_tokens = frozenset(stop_tokens)
        self._one_at_a_time = threading.Lock()

    def gather(
        self,
        trajectories: TrajectoryBatch,
        prompts: Mapping[int, TokenizedPrompt],
        *,
        step: int,
        phase: Callable[[str], AbstractContextManager[None]] = lambda name: nullcontext(),
        scored: ScoredSamples | None = None,
        old_log_probs: Literal["policy", "rollout"] = "policy",
    ) -> tuple[TrajectoryBatch, Schedules, list[TextSample]]:
        """The batch with scores, log-probs, reference log-probs and values; the schedules that these used; the samples.

        ``step`` decides how the batch is divided into updates. ``scored`` holds the rewards if they are known already.
        ``old_log_probs`` says whose the log-probs are: the policy's, or those that came with the samples.
        ``phase`` times each wait. Samples without a reward are left out as configured, or raise :class:`ScoringError`.
        """
        if self.config.rollout.cuts and trajectories.kept is None:
            raise RequestError(
                "the samples lack the columns kept_sizes and kept_words, but rollout.top_p, top_k or min_p cut what they were "
                "sampled from: carry them along in algorithm.collector, or set top_p to 1, top_k to 0 and min_p to 0"
            )
        if self.config.rollout.routing_replay and ROUTED not in trajectories:
            raise RequestError(
                f"the samples lack the column {ROUTED}, but rollout.routing_replay is true: carry it along in "
                "algorithm.collector, or set it to false"
            )
        schedules = self.groups.schedules(trajectories, step)
        pending = self.groups.columns(trajectories, schedules, log_probs=old_log_probs == "policy")
        with phase("scoring"):
            scored = scored or self.score_trajectories(trajectories, prompts)
            samples, results = scored.samples, scored.results
        with phase("log_probs"):
            columns = {name: column.result() for name, column in pending.items()}
        if old_log_probs == "rollout":
            columns["log_probs"] = trajectories["rollout_log_probs"]
        kept = self.rows_to_keep(samples, results)
        if len(kept) < len(trajectories):
            rest = trajectories.select(kept)
            left = scored.select(kept)
            return self.gather(rest, prompts, step=step, phase=phase, scored=left, old_log_probs=old_log_probs)
        columns |= {name: torch.tensor(values) for name, values in score_columns(results).items()}
        columns |= self.step_columns(trajectories, prompts, scored)
        return trajectories.with_columns(**columns), schedules, samples

    def step_columns(
        self, trajectories: TrajectoryBatch, prompts: Mapping[int, TokenizedPrompt], scored: ScoredSamples
    ) -> dict[str, torch.Tensor]:
        """The rewards of steps at their tokens, as the column ``turn_rewards``; nothing where answers have one reward."""
        if not any(isinstance(result, SteppedResult) for result in scored.results):
            return {}
        rewards = torch.zeros(trajectories.num_tokens)
        for start, sample, result in zip(trajectories.offsets.tolist(), scored.samples, scored.results, strict=False):
            assert isinstance(result, SteppedResult), "all results come from one source"
            first = len(prompts[sample.prompt_id].token_ids)
            try:
                places = step_tokens(result.steps, sample.response, sample.token_ids[first:], self.tokenizer)
            except ValueError as error:
                where = f"sample {sample.sample_index} of prompt {sample.prompt_id}"
                raise ScoringError(f"the steps of {where} have no tokens: {error}; set reward.steps to last") from error
            for place, (_, reward) in zip(places, result.steps, strict=True):
                rewards[start + first + place] += reward
        return {"turn_rewards": rewards}

    def score_trajectories(
        self, trajectories: TrajectoryBatch, prompts: Mapping[int, TokenizedPrompt]
    ) -> ScoredSamples:
        """Every sampled answer as text, with its reward or the reason why it has none."""
        samples = self.decode(trajectories, prompts)
        return ScoredSamples(samples, self.score(samples))

    @spans.span("decoding")
    def decode(self, trajectories: TrajectoryBatch, prompts: Mapping[int, TokenizedPrompt]) -> list[TextSample]:
        """Every sampled answer as text."""
        samples = []
        offsets = trajectories.offsets.tolist()
        token_ids = trajectories["token_ids"].tolist()
        indices = trajectories["sample_index"].tolist()
        finished = (trajectories["finish_reason"] == FinishReason.STOP).tolist()
        outcomes = episode_outcomes(trajectories)
        for row, prompt_id in enumerate(trajectories["prompt_id"].tolist()):
            prompt = prompts[prompt_id]
            samples.append(
                text_sample(
                    prompt,
                    indices[row],
                    token_ids[offsets[row] + len(prompt.token_ids) : offsets[row + 1]],
                    finished=finished[row],
                    tokenizer=self.tokenizer,
                    stop_tokens=self.stop_tokens,
                    **outcomes[row],
                )
            )
        return samples

    def score(self, samples: Sequence[TextSample]) -> list[ScoreResult]:
        """One result a sample, in order; a sample that the source fails at is tried again for ``reward.hold_s`` seconds."""
        with self._one_at_a_time:  # a collector may score the next step in the background
            return score_or_hold(self.rewards, samples, hold_s=self.config.reward.hold_s)

    def require_rewards(self, samples: Sequence[TextSample]) -> list[ScoreResult]:
        """One result a sample, in order, each with a reward; raises :class:`ScoringError` where one has none."""
        results = self.score(samples)
        errors = [result.error for result in results if result.error is not None]
        if errors:
            raise ScoringError(f"no reward for {len(errors)} of {len(results)} samples, such as: {errors[0]}")
        return results

    def rows_to_keep(
        self, samples: Sequence[TextSample], results: Sequence[ScoreResult], what: str = "reward"
    ) -> list[int]:
        """Rows of the prompts whose samples all have a reward; raises :class:`ScoringError` where the run must stop.

        ``what`` is what the results are called in the message.
        """
        failed = [row for row, result in enumerate(results) if result.error is not None]
        if not failed:
            return list(range(len(results)))
        lost = {samples[row].prompt_id for row in failed}
        prompts, first, reward = {sample.prompt_id for sample in samples}, samples[failed[0]], self.config.reward
        held = f" after {reward.hold_s:g} s" if results[failed[0]].fault == "source" else ""
        reason = (
            f"no {what} for {len(failed)} of {len(samples)} samples{held}, such as sample {first.sample_index} of prompt "
            f"{first.prompt_id}: {results[failed[0]].error}"
        )
        if not reward.drops:
            raise ScoringError(f"{reason}; mend the reward source, or set reward.on_failure to drop")
        if len(lost) > reward.max_dropped_share * len(prompts):
            raise ScoringError(f"{reason}; {len(lost)} of {len(prompts)} prompts would be dropped, more than "
                               f"reward.max_dropped_share {reward.max_dropped_share:g}: mend the reward source")  # fmt: skip
        get_logger("ppo").warning(
            "%s; dropped %d of %d prompts with all their samples", reason, len(lost), len(prompts)
        )
        return [row for row, sample in enumerate(samples) if sample.prompt_id not in lost]

    @spans.span("advantages")
    def advantages(
        self, batch: TrajectoryBatch, kl_coefficient: float, moments: RunningMoments
    ) -> tuple[TrajectoryBatch, dict[str, float]]:
        """The batch with token rewards, advantages, returns and importance weights; and metrics of these."""
        return self.preparation(batch, kl_coefficient=kl_coefficient, moments=moments)
