"""Metrics of a PPO step besides those of its advantages and losses.

Invariants: every number is of this step's batch. The gold score is logged and never trained on. The first steps say why where
nearly every answer was cut.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from rlhf_ray.algorithms.kl import sequence_kl
from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.console import get_logger
from rlhf_ray.data.ends import EndTokens, why_cut
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.evaluation.agreement import Spread
from rlhf_ray.evaluation.positions import by_position, growth
from rlhf_ray.processes import spans
from rlhf_ray.rewards.judge.source import Judge
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.storage.jsonl import as_json
from rlhf_ray.trainers.ppo.experience import TERM
from rlhf_ray.trainers.ppo.gold import Gold
from rlhf_ray.trainers.ppo.sampling import Collected
from rlhf_ray.trainers.ppo.self_check import log_prob_bounds, log_prob_difference
from rlhf_ray.trajectories.batch import TrajectoryBatch

TOKENS_KEPT = 1024
"""Of the answer of a sample, at most, with the numbers of each."""
TOKEN_NUMBERS = (
    "log_probs",
    "rollout_log_probs",
    "reference_log_probs",
    "values",
    "token_rewards",
    "returns",
    "advantages",
)
"""Columns of a batch that are kept of each token of a sample, where the batch has them."""
NOISE_BELOW_BOUND = 4.0
"""A mean difference so many times smaller than the self-check allows is rounding, wherever it stands."""


ERRORS_BELOW_ZERO = 4.0
"""A mean KL is called negative if it is this many standard errors below 0."""


FIRST_STEPS = 3
"""So many steps of an attempt say why nearly every answer was cut."""


@dataclass
class StepMetrics:
    """Measures the batch of each step; ``gold`` scores its samples where the truth about them is known."""

    config: PpoConfig
    tokenizer: Any
    ends: EndTokens
    gold: Gold | None = None
    judges: Sequence[Judge[Any]] = ()
    steps: int = 0
    """How many steps were measured in this attempt."""
    _said_growing: bool = False

    @spans.span("measuring")
    def measure(
        self, batch: TrajectoryBatch, samples: Sequence[TextSample], collected: Collected, *, weight_version: int
    ) -> dict[str, float]:
        """Scores, lengths, staleness, and how far rollout and trainer, and tokens and text, differ.

        ``weight_version`` is that of the weights which are about to learn.
        """
        warning = negative_kl(batch, self.config)
        if warning is not None:
            get_logger("ppo").warning("%s", warning)
        prompts = collected.by_id
        if "turns" not in batch:  # an episode of several turns is no answer: its last id says nothing of the others
            self._say_why_cut(samples, prompts)
        prompt_tokens = sum(len(prompts[prompt_id].token_ids) for prompt_id in batch["prompt_id"].tolist())
        metrics = {
            "reward/learned": float(batch["score"].mean()),
            "length/prompt": prompt_tokens / len(batch),
            **self.differences(batch, weight_version),
            **staleness(batch, weight_version),
            "round_trip/failed_share": failed_round_trips(self.tokenizer, samples, prompts),
            "prompts/sampled": float(len(collected.prompts)),
            "prompts/dropped": float(_count_prompts(collected.trajectories) - _count_prompts(batch)),
        }
        if "turns" in batch:
            metrics["length/turns"] = float(batch["turns"].float().mean())
        terms = [name for name in batch.columns if name.startswith(TERM)]
        metrics |= {f"reward_term/{name.removeprefix(TERM)}": float(batch[name].mean()) for name in terms}
        metrics |= judge_metrics(self.judges)
        if self.gold is not None:
            scores = [result.reward for result in self.gold(samples) if result.reward is not None]
            if scores:
                metrics["gold/mean"] = sum(scores) / len(scores)
        return metrics

    def differences(self, batch: TrajectoryBatch, weight_version: int) -> dict[str, float]:
        """How far the log-probs of rollout and trainer differ; nothing where the trainer takes those of the rollout."""
        if self.config.algorithm.old_log_probs == "rollout":
            return {}
        largest = float(log_prob_difference(batch).max())
        return {"rollout/log_prob_difference": largest, **self.by_position(batch, weight_version)}

    def by_position(self, batch: TrajectoryBatch, weight_version: int) -> dict[str, float]:
        """How far rollout and trainer differ in each part of an answer; that it grows is said once in an attempt.

        Nothing is said where other weights sampled than those that the trainer holds: between those a difference is no error.
        """
        metrics, warning = differences_by_position(batch, self.config)
        same_weights = bool((batch["weight_version"][batch["action_mask"]] == weight_version).all())
        if warning is not None and same_weights and not self._said_growing:
            get_logger("ppo").warning("%s", warning)
            self._said_growing = True
        return metrics

    def _say_why_cut(self, samples: Sequence[TextSample], prompts: Mapping[int, TokenizedPrompt]) -> None:
        self.steps += 1
        if self.steps > FIRST_STEPS:
            return
        answers = [sampled_ids(sample, prompts) for sample in samples]
        reason = why_cut(self.tokenizer, self.ends, answers, self.config.rollout.max_new_tokens)
        if reason is not None:
            get_logger("ppo").warning("%s", reason)


def judge_metrics(judges: Sequence[Judge[Any]]) -> dict[str, float]:
    """What all judges did since the last call, evaluations included; nothing where there are none."""
    if not judges:
        return {}
    tallies = [asdict(judge.take_tally()) for judge in judges]
    sums = {name: float(sum(tally[name] for tally in tallies)) for name in tallies[0]}
    comparisons, first = sums.pop("comparisons"), sums.pop("first")
    metrics = {f"judge/{name}": value for name, value in sums.items()}
    return metrics | ({"judge/first_better": first / comparisons} if comparisons else {})


def staleness(batch: TrajectoryBatch, version: int) -> dict[str, float]:
    """Publications from the weights that sampled the oldest token of an answer to ``version``: their maximum and their mean."""
    never = torch.iinfo(batch["weight_version"].dtype).max
    versions = torch.where(batch["action_mask"], batch["weight_version"], never)
    oldest = torch.full((len(batch),), never, dtype=versions.dtype).scatter_reduce(
        0, batch.sequence_ids, versions, "amin"
    )
    ages = (version - oldest[oldest < never]).double()  # an answer without an action has no age
    return {"rollout/staleness": float(ages.max()), "rollout/staleness_mean": float(ages.mean())}


def differences_by_position(batch: TrajectoryBatch, config: PpoConfig) -> tuple[dict[str, float], str | None]:
    """The mean absolute difference of log-probs, rollout to trainer, in each eighth of the longest answer that has tokens.

    Besides it a warning, where the difference grows with the position to more than what rounding may be on average.
    """
    difference = batch["log_probs"] - batch["rollout_log_probs"]
    parts = by_position(difference, batch["action_mask"], batch.offsets, config.rollout.max_new_tokens)
    metrics = {
        f"rollout/log_prob_difference_part_{number}": part.mean
        for number, part in enumerate(parts, start=1)
        if part is not None
    }
    ends = growth(parts, log_prob_bounds(config).mean / NOISE_BELOW_BOUND)
    if ends is None:
        return metrics, None
    first, last = ends
    return metrics, (
        f"rollout and trainer differ by {last.mean:.2g} nats a token late in the answers and by {first.mean:.2g} at their "
        "beginning: an error that grows with the position, such as of position ids, a sliding window or a prefix cache. "
        f"Compare with rollout.backend=transformers (now {config.rollout.backend}), which samples with the trainer's own model"
    )


def sampled_ids(sample: TextSample, prompts: Mapping[int, TokenizedPrompt]) -> list[int]:
    """The ids of an answer, without those of its prompt."""
    return list(sample.token_ids[len(prompts[sample.prompt_id].token_ids) :])


def negative_kl(batch: TrajectoryBatch, config: PpoConfig) -> str | None:
    """A warning where the mean KL from the reference is below zero by more than its noise; none otherwise.

    E[log p - log q] is at least 0 if the samples are p's own. A mean clearly below 0 therefore shows that they are not, and
    the warning names the settings to look at. Without a reference there is no KL and no warning.
    """
    if "reference_log_probs" not in batch:
        return None
    kl = sequence_kl(batch["log_probs"], batch["reference_log_probs"], batch["action_mask"], batch.offsets).double()
    mean, error = float(kl.mean()), float(kl.std(unbiased=False)) / len(kl) ** 0.5
    if mean + ERRORS_BELOW_ZERO * error >= 0.0:
        return None
    spread, rollout = Spread(log_prob_difference(batch)), config.rollout
    text = f"KL from the reference is {mean:.3g} nats, {-mean / error:.1f} standard errors below 0: answers are not drawn from "
    if not spread.within(log_prob_bounds(config)):
        return (
            f"{text}the policy that is measured. Rollout and trainer differ by {spread.mean:.2g} nats a token on average: "
            f"compare rollout.dtype ({rollout.dtype}) with policy.model.dtype ({config.policy.model.dtype})"
        )
    return (
        f"{text}the distribution that is measured. Something cuts or sharpens it besides the config: rollout.temperature is "
        f"{rollout.temperature:g}, top_p {rollout.top_p:g}, top_k {rollout.top_k}, min_p {rollout.min_p:g}; look at "
        "algorithm.collector, or set top_p 1, top_k 0 and min_p 0, which leave the distribution whole"
    )


def failed_round_trips(tokenizer: Any, samples: Sequence[TextSample], prompts: Mapping[int, TokenizedPrompt]) -> float:
    """Share of samples whose ids are not what their text encodes to: a reward by text then reads other tokens."""
    failed = 0
    for sample in samples:
        answer = sampled_ids(sample, prompts)
        text = tokenizer.decode(answer, skip_special_tokens=False)
        failed += tokenizer(text, add_special_tokens=False)["input_ids"] != answer
    return failed / len(samples)


def sample_rows(
    samples: Sequence[TextSample], batch: TrajectoryBatch, tokenizer: Any, count: int
) -> list[dict[str, object]]:
    """The first ``count`` samples of a step as rows of the run's ``samples/``."""
    return [
        {
            "prompt": sample.prompt,
            **_beside(sample),
            "response": sample.response,
            "finished": sample.finished,
            "score": round(float(batch["score"][row]), 4),
            **_kept_tokens(batch, row, tokenizer),
        }
        for row, sample in enumerate(samples[:count])
    ]


def _beside(sample: TextSample) -> dict[str, object]:
    """What another reward needs of a sample besides its prompt and its response, where JSON can hold it."""
    columns = {
        "prompt_id": sample.prompt_id,
        "messages": sample.messages and [*sample.messages[:-1]],
        "tools": sample.tools,
        "chat_template_kwargs": sample.template_variables,
        "label": sample.label,
        "source": sample.source or None,
    }
    return {name: plain for name, value in columns.items() if (plain := as_json(value)) is not None}


def _kept_tokens(batch: TrajectoryBatch, row: int, tokenizer: Any) -> dict[str, object]:
    """The tokens of a sample from its first action on, with the numbers of each; null where one was not sampled."""
    first, end = (int(batch.offsets[row + at]) for at in (0, 1))
    actions = batch["action_mask"][first:end]
    if not actions.any():
        return {}
    begin = first + int(actions.int().argmax())
    kept = slice(begin, min(end, begin + TOKENS_KEPT))
    sampled = batch["action_mask"][kept].tolist()
    columns: dict[str, list[Any]] = {"text": [tokenizer.decode([token]) for token in batch["token_ids"][kept].tolist()]}
    for name in TOKEN_NUMBERS:
        if name in batch:
            numbers = zip(batch[name][kept].tolist(), sampled, strict=True)
            columns[name] = [round(one, 4) if is_action and math.isfinite(one) else None for one, is_action in numbers]
    left_out = end - kept.stop
    return {"tokens": columns} | ({"left_out": left_out} if left_out else {})


def _count_prompts(batch: TrajectoryBatch) -> int:
    return len(batch["prompt_id"].unique())
