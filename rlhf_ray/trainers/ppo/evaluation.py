"""Measure on held-out prompts whether the policy got better than the one that the run started from.

Invariants: both policies answer the same prompts in the same way, sampled at the training temperature or greedily. A prompt
whose answers have no reward is treated as in training: it is left out, for both policies, and counted, or the evaluation fails.
The answers of the start are kept with the run, so that a resumed run compares with the same answers. Best-of-n of the start,
with the KL that picking costs, picks by the shaped rewards that the run trains on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.algorithms.kl import sequence_kl
from rlhf_ray.algorithms.masked import count_actions
from rlhf_ray.algorithms.moments import RunningMoments
from rlhf_ray.algorithms.shaping import RewardShaping
from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.errors import IntegrityError, ScoringError
from rlhf_ray.evaluation import best_of_n, best_of_n_kl
from rlhf_ray.monitoring.report.summary import BestOf
from rlhf_ray.rewards.request import ScoreResult
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.storage.reading import read_text
from rlhf_ray.trainers.ppo.answers import HeldOutAnswer, compare_answers
from rlhf_ray.trainers.ppo.experience import Experience
from rlhf_ray.trainers.ppo.gold import Gold, Measures
from rlhf_ray.trajectories.batch import TrajectoryBatch

Generate = Callable[[Sequence[TokenizedPrompt], int, bool], TrajectoryBatch]
"""Answers prompts; the arguments are the prompts, the answers to each, and whether to take the likeliest tokens (greedy)."""


@dataclass(frozen=True)
class Comparison:
    """The policy as it is now against the start: figures by their metric names, and answers in the same order of prompts."""

    figures: Mapping[str, float]
    start: Sequence[HeldOutAnswer]
    now: Sequence[HeldOutAnswer]
    best_of: Sequence[BestOf]
    measures: Sequence[str] = ()
    """Names of the figures that are measures of the text of answers."""


class PpoEvaluation:
    """Answers the first ``evaluation.prompts`` held-out prompts, once with the start and then as often as needed.

    ``directory`` keeps the answers of the start.
    """

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
        self.start_kl: float | None = None
        """KL of the start from a reference that is another model, such as a teacher."""

    @property
    def possible(self) -> bool:
        """Whether there are held-out prompts."""
        return bool(self.prompts)

    def measure_start(self, *, resumed: bool) -> None:
        """Take the answers of the starting policy: generate them, or in a resumed run read those that it kept."""
        if not self.possible:
            return
        path = self.directory / "start.json"
        if resumed:
            self.start, self.best, self.start_kl = _read_start(path)
            return
        self.start, figures = self.answer_prompts()
        reference, policy = self.config.reference, self.config.policy.model
        if reference is not None and (reference.model.path, reference.model.make) != (policy.path, policy.make):
            self.start_kl = figures.get("evaluation/kl")
        self.best = self.measure_best_of()
        self.directory.mkdir(parents=True, exist_ok=True)
        content: dict[str, Any] = {
            "answers": [asdict(row) for row in self.start],
            "best_of": [asdict(row) for row in self.best],
        }
        if self.start_kl is not None:
            content["kl"] = self.start_kl
        path.write_text(json.dumps(content))

    def compare(self) -> Comparison:
        """The answers of the current policy and their figures, against those of the start."""
        answers, figures = self.answer_prompts()
        now, start = in_both(answers, self.start)
        if not now:
            raise ScoringError(
                "no held-out prompt has rewards for its answers both by the policy of the start and by the current one: mend "
                "the reward source (reward.on_failure drop leaves out prompts without)"
            )
        figures |= compare_answers(now, start, self.config.evaluation.pass_at, self.measures)
        if self.config.reward.drops:
            left_out = len(self.prompts) - len({answer.prompt_id for answer in now})
            figures["evaluation/prompts_dropped"] = float(left_out)
        if self.start_kl is not None:
            figures["evaluation/kl_start"] = self.start_kl
        return Comparison(figures, start, now, self.best, tuple(self.measures))

    def answer_prompts(self) -> tuple[list[HeldOutAnswer], dict[str, float]]:
        """The current policy's answers, those to one prompt together.

        With them, if they are samples and there is a reference, the mean KL of an answer (k1, in nats).
        """
        settings = self.config.evaluation
        batch, _, samples = self.experience.gather(
            self.generate(self.prompts, settings.samples_per_prompt, settings.greedy),
            {prompt.prompt_id: prompt for prompt in self.prompts},
            step=0,
        )
        if self.gold is None:
            gold = None
        else:
            batch, samples, gold = self._with_gold(batch, samples, self.gold(samples))
        answers = self._held_out_answers(samples, batch["score"].tolist(), gold)
        if settings.greedy or "reference_log_probs" not in batch:
            return answers, {}
        kl = sequence_kl(batch["log_probs"], batch["reference_log_probs"], batch["action_mask"], batch.offsets)
        return answers, {"evaluation/kl": float(kl.mean())}

    def measure_best_of(self) -> list[BestOf]:
        """Expected gold of the best of n samples of the start, for n = 2, 4, 8, ... and ``evaluation.best_of``.

        The best is the sample with the highest shaped reward. Nothing where no gold function is known.
        """
        largest = self.config.evaluation.best_of
        if largest < 2 or self.gold is None:
            return []
        trajectories = self.generate(self.prompts, largest, False)
        samples = self.experience.decode(trajectories, {prompt.prompt_id: prompt for prompt in self.prompts})
        results = self.experience.score(samples)
        # Reversed, so that the first answer to each prompt is the one that stays in the mapping.
        baseline = {answer.prompt_id: float(answer.gold or 0.0) for answer in reversed(self.start)}
        kept = [row for row in self.experience.rows_to_keep(samples, results) if samples[row].prompt_id in baseline]
        trajectories = trajectories.select(kept).with_columns(score=torch.tensor(_rewards(results, kept)))
        trajectories, samples, gold = self._with_gold(
            trajectories, [samples[row] for row in kept], self.gold([samples[row] for row in kept])
        )
        rewards = self._shape(trajectories)
        by_prompt = [slice(first, first + largest) for first in range(0, len(samples), largest)]
        wins = [_score_wins(gold[rows], baseline[samples[rows.start].prompt_id]) for rows in by_prompt]
        prompt_rewards, prompt_gold = [rewards[rows] for rows in by_prompt], [gold[rows] for rows in by_prompt]
        return [
            BestOf(n, best_of_n_kl(n), best_of_n(prompt_rewards, prompt_gold, n), best_of_n(prompt_rewards, wins, n))
            for n in best_of_sizes(largest)
        ]

    def _with_gold(
        self, batch: TrajectoryBatch, samples: Sequence[TextSample], results: Sequence[ScoreResult]
    ) -> tuple[TrajectoryBatch, list[TextSample], list[float]]:
        """The rows of the prompts whose samples all have a gold score, with these scores."""
        kept = self.experience.rows_to_keep(samples, results, "gold score (evaluation.gold)")
        return batch.select(kept), [samples[row] for row in kept], _rewards(results, kept)

    def _shape(self, trajectories: TrajectoryBatch) -> list[float]:
        """The rewards as training would shape them, so that an answer which training punishes is not picked."""
        score = trajectories["score"]
        tokens = count_actions(trajectories["action_mask"], trajectories.offsets)
        moments = RunningMoments().update(score)
        shaped = self.shaping(score, trajectories["finish_reason"], tokens, moments)
        return [float(value) for value in shaped]

    def _held_out_answers(
        self, samples: Sequence[TextSample], scores: Sequence[float], gold: Sequence[float] | None
    ) -> list[HeldOutAnswer]:
        lengths = {prompt.prompt_id: len(prompt.token_ids) for prompt in self.prompts}
        truths: Sequence[float | None] = [None] * len(samples) if gold is None else gold
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
            for sample, score, truth in zip(samples, scores, truths, strict=True)
        ]


def in_both(
    now: Sequence[HeldOutAnswer], start: Sequence[HeldOutAnswer]
) -> tuple[list[HeldOutAnswer], list[HeldOutAnswer]]:
    """The answers of each to the prompts that both have answers to, in the order of each."""
    common = {answer.prompt_id for answer in now} & {answer.prompt_id for answer in start}
    kept_now, kept_start = ([answer for answer in rows if answer.prompt_id in common] for rows in (now, start))
    return kept_now, kept_start


def _read_start(path: Path) -> tuple[list[HeldOutAnswer], list[BestOf], float | None]:
    """The answers of the starting policy that a run kept, best-of-n of them, and its KL where that was kept."""
    columns = {field.name for field in fields(HeldOutAnswer)}  # version 0.1 kept a count of habits beside them
    try:
        stored = json.loads(read_text(path))
        answers = [HeldOutAnswer(**{key: row[key] for key in row if key in columns}) for row in stored["answers"]]
        return answers, [BestOf(**row) for row in stored["best_of"]], stored.get("kl")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise IntegrityError(
            f"{path} is damaged ({type(error).__name__}): restore it from a backup; the evaluation compares with it"
        ) from error


def best_of_sizes(largest: int) -> list[int]:
    """The powers of two from 2 that are below ``largest``, and ``largest`` itself."""
    return [*(2**power for power in range(1, largest.bit_length()) if 2**power < largest), largest]


def best_within_kl(best: Sequence[BestOf], kl: float) -> BestOf | None:
    """The entry with the largest n whose KL is at most ``kl`` nats; none where even two samples cost more."""
    within = [row for row in best if row.kl <= kl]
    return max(within, key=lambda row: row.n) if within else None


def _rewards(results: Sequence[ScoreResult], rows: Sequence[int]) -> list[float]:
    """The rewards of these rows, which all have one."""
    rewards = (results[row].reward for row in rows)
    return [reward for reward in rewards if reward is not None]


def _score_wins(gold: Sequence[float], baseline: float) -> list[float]:
    """1 for each value above the baseline, one half for a tie, 0 below."""
    return [1.0 if value > baseline else 0.5 if value == baseline else 0.0 for value in gold]
