"""Held-out prompts, answered by the starting policy once and by the trained one when due: did it get better?

Always true: both sides answer the same held-out prompts in the same way, sampled at the training temperature or greedily;
what the starting policy answered is kept with the run, so that a resumed run compares with the same answers; best-of-n of
the starting policy stands beside, with the KL that picking costs, and picks by the shaped rewards that the run trains on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from rlhf_ray.algorithms.kl import sequence_kl
from rlhf_ray.algorithms.masked import count_actions
from rlhf_ray.algorithms.moments import RunningMoments
from rlhf_ray.algorithms.shaping import RewardShaping
from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.evaluation import best_of_n, best_of_n_kl
from rlhf_ray.monitoring.report.summary import BestOf
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.trainers.ppo.answers import HeldOutAnswer, compare_answers
from rlhf_ray.trainers.ppo.experience import Experience
from rlhf_ray.trainers.ppo.gold import Gold, Measures
from rlhf_ray.trajectories.batch import TrajectoryBatch

Generate = Callable[[Sequence[TokenizedPrompt], int, bool], TrajectoryBatch]
"""From prompts, samples a prompt, and whether to take the likeliest tokens, to trajectories."""


@dataclass(frozen=True)
class Comparison:
    """The start and now: figures by their metric names, answers to the same prompts in the same order."""

    figures: Mapping[str, float]
    start: Sequence[HeldOutAnswer]
    now: Sequence[HeldOutAnswer]
    best_of: Sequence[BestOf]
    measures: Sequence[str] = ()
    """Names of the figures that were measured in the texts of answers."""


class PpoEvaluation:
    """Answers to the held-out prompts, before and after."""

    def __init__(
        self,
        config: PpoConfig,
        experience: Experience,
        prompts: Sequence[TokenizedPrompt],
        *,
        shaping: RewardShaping,
        gold: Gold | None,
        measures: Measures,
        generate: Generate,
        directory: Path,
    ) -> None:
        self.config = config
        self.experience = experience
        self.prompts = list(prompts)[: config.evaluation.prompts]
        self.shaping = shaping
        self.gold = gold
        self.measures = measures
        self.generate = generate
        self.directory = directory
        self.start: list[HeldOutAnswer] = []
        self.best: list[BestOf] = []

    @property
    def possible(self) -> bool:
        """Whether there is anything to evaluate on."""
        return bool(self.prompts)

    def measure_start(self, *, resumed: bool) -> None:
        """The starting policy's answers: drawn now, or in a resumed run those of its first start."""
        if not self.possible:
            return
        kept = self.directory / "start.json"
        if resumed:
            stored = json.loads(kept.read_text())
            columns = {field.name for field in fields(HeldOutAnswer)}  # version 0.1 kept a count of habits beside them
            self.start = [
                HeldOutAnswer(**{key: row[key] for key in row if key in columns}) for row in stored["answers"]
            ]
            self.best = [BestOf(**row) for row in stored["best_of"]]
            return
        self.start, _ = self.answers()
        self.best = self.best_of()
        self.directory.mkdir(parents=True, exist_ok=True)
        content = {"answers": [asdict(row) for row in self.start], "best_of": [asdict(row) for row in self.best]}
        kept.write_text(json.dumps(content))

    def compare(self) -> Comparison:
        """The current policy's answers and their figures, beside the starting policy's."""
        answers, figures = self.answers()
        figures |= compare_answers(answers, self.start, self.config.evaluation.pass_at, self.measures)
        return Comparison(figures, self.start, answers, self.best, tuple(self.measures))

    def answers(self) -> tuple[list[HeldOutAnswer], dict[str, float]]:
        """HeldOutAnswer answers, those to one prompt together; where they are samples, their mean sequence KL (k1) in nats."""
        asked = self.config.evaluation
        batch, _, samples = self.experience.gather(
            self.generate(self.prompts, asked.samples_per_prompt, asked.greedy),
            {prompt.prompt_id: prompt for prompt in self.prompts},
            step=0,
            complete=True,
        )
        rows = self._judged(samples, batch["score"].tolist())
        if asked.greedy or "reference_log_probs" not in batch:
            return rows, {}
        kl = sequence_kl(batch["log_probs"], batch["reference_log_probs"], batch["action_mask"], batch.offsets)
        return rows, {"evaluation/kl": float(kl.mean())}

    def best_of(self) -> list[BestOf]:
        """Expected gold of the best of 2, 4, 8, ... and ``evaluation.best_of`` samples of the start by their shaped rewards."""
        largest = self.config.evaluation.best_of
        if largest < 2 or self.gold is None:
            return []
        trajectories = self.generate(self.prompts, largest, False)
        samples = self.experience.decode(trajectories, {prompt.prompt_id: prompt for prompt in self.prompts})
        rewards, gold = self._shaped(trajectories, self.experience.require_rewards(samples)), self.gold(samples)
        first = {row.prompt_id: float(row.gold or 0.0) for row in reversed(self.start)}
        by_prompt = [slice(start, start + largest) for start in range(0, len(samples), largest)]
        won = [_won(gold[rows], first[samples[rows.start].prompt_id]) for rows in by_prompt]
        rewards_of, gold_of = [rewards[rows] for rows in by_prompt], [gold[rows] for rows in by_prompt]
        return [
            BestOf(n, best_of_n_kl(n), best_of_n(rewards_of, gold_of, n), best_of_n(rewards_of, won, n))
            for n in best_of_sizes(largest)
        ]

    def _shaped(self, trajectories: TrajectoryBatch, rewards: Sequence[float]) -> list[float]:
        """What training would make of the rewards: a judge that knows nothing of answers cut off picks none of them."""
        score = torch.tensor(rewards)
        tokens = count_actions(trajectories["action_mask"], trajectories.offsets)
        moments = RunningMoments().update(score)
        shaped = self.shaping(score, trajectories["finish_reason"], tokens, moments)
        return [float(value) for value in shaped]

    def _judged(self, samples: Sequence[TextSample], scores: Sequence[float]) -> list[HeldOutAnswer]:
        lengths = {prompt.prompt_id: len(prompt.token_ids) for prompt in self.prompts}
        gold = [None] * len(samples) if self.gold is None else self.gold(samples)
        return [
            HeldOutAnswer(
                prompt_id=sample.prompt_id,
                prompt=sample.prompt,
                response=sample.response,
                finished=sample.finished,
                tokens=len(sample.token_ids) - lengths[sample.prompt_id],
                reward=score,
                gold=truth,
                source=sample.source,
            )
            for sample, score, truth in zip(samples, scores, gold, strict=True)
        ]


def best_of_sizes(largest: int) -> list[int]:
    """2, 4, 8, ... and ``largest`` itself."""
    return [*(2**power for power in range(1, largest.bit_length()) if 2**power < largest), largest]


def best_within_kl(best: Sequence[BestOf], kl: float) -> BestOf | None:
    """The largest n whose KL is at most ``kl`` nats; none where even two samples cost more."""
    within = [row for row in best if row.kl <= kl]
    return max(within, key=lambda row: row.n) if within else None


def _won(gold: Sequence[float], baseline: float) -> list[float]:
    return [1.0 if value > baseline else 0.5 if value == baseline else 0.0 for value in gold]
