"""Workers that score with a reward model: on the packed forward pass of this project, or in vLLM's pooling runner.

Invariants: a score does not depend on what else was asked for, nor on which rank or runner computed it; every request ends
in one result, a score or a sentence that says why there is none; an item that the model fails on costs no other its score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from rlhf_ray import environment
from rlhf_ray.actors.workers.base import Worker
from rlhf_ray.actors.workers.critic import RegressionWorker
from rlhf_ray.actors.workers.model import Part, WorkerSetup
from rlhf_ray.actors.workers.request_scoring import RequestScorer, TextPairScorer, score_apart, scoring_packs
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.console import get_logger
from rlhf_ray.environment import keep_freed_memory
from rlhf_ray.network import LOOPBACK, variables_at
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import MicroBatch

if TYPE_CHECKING:
    from rlhf_ray.models.forward.parallel_packs import ParallelPacks
    from rlhf_ray.models.reward_reading import RewardReading


@dataclass(frozen=True)
class RewardSetup(WorkerSetup):
    """What a reward model needs besides."""

    max_tokens: int = 4096
    """Token budget of what a rank computes at once when it scores requests."""
    max_item_tokens: int = 4096
    """The longest item that is scored."""
    max_item_bytes: int | None = None
    """Bytes of text above which an item is refused before it is read; none where nobody else waits meanwhile."""
    refuse_markers: bool = False
    """Whether an item whose texts hold what marks turns gets an error."""


def scoring_reading(setup: RewardSetup, tokenizer: Any, rank: int) -> RewardReading:
    """How a model that scores reads its items; rank 0 says it, and what has changed since the training."""
    from rlhf_ray.models import load_reward_reading

    role, model = setup.config, setup.config.model
    said = {"form": role.form, "scored_token": role.scored_token} if isinstance(role, ScoringRole) else {}
    reading: RewardReading = load_reward_reading(model, tokenizer, **said)
    if rank == 0:
        get_logger(__name__).info("%s %s", model.path or "a made model", reading.sentence())
        for warning in reading.warnings:
            get_logger(__name__).warning("%s", warning)
    return reading


class RewardWorker(RegressionWorker[RewardSetup]):
    """The reward model in an engine of this project."""

    role = "reward"
    model_type = "reward"
    streams: ParallelPacks | None = None
    """Runs packs side by side, on a rank that only scores and has several threads of a CPU."""

    def setup(self, setup: RewardSetup) -> str:
        from rlhf_ray.models import load_tokenizer

        self.tokenizer = load_tokenizer(setup.config.model)
        reading = self._reading(setup)
        line = super().setup(setup)
        self.scorer = RequestScorer(
            self.tokenizer,
            self.hf_model.config,
            reading=reading,
            vocabulary=self.hf_model.get_input_embeddings().num_embeddings,
            max_item_tokens=setup.max_item_tokens,
            max_item_bytes=setup.max_item_bytes,
            refuse_markers=setup.refuse_markers,
        )
        self.streams = self._make_streams(setup)
        return f"{line}, {reading.sentence()}"

    def _reading(self, setup: RewardSetup) -> RewardReading:
        return scoring_reading(setup, self.tokenizer, self.rank)

    def _make_streams(self, setup: RewardSetup) -> ParallelPacks | None:
        from rlhf_ray.models.forward.parallel_packs import ParallelPacks
        from rlhf_ray.models.forward.shards import in_shards

        threads = setup.config.resources.threads_per_rank
        alone = setup.total_updates is None and self.device.type == "cpu" and not in_shards(self.hf_model)
        if threads == 1 or not alone:
            return None
        keep_freed_memory()
        return ParallelPacks(threads)

    def describe(self) -> dict[str, Any]:
        """What callers must know of this model: its tokenizer and template, how it reads, its limit, and its mean and std."""
        return self.scorer.describe()

    def scores(
        self, batch: TrajectoryBatch, micro_batches: Sequence[MicroBatch], streams: ParallelPacks | None = None
    ) -> list[Part]:
        """One score per sequence, read at its last token."""
        with self.doing("score"):
            return self.forward_parts(
                batch, micro_batches, lambda module, packed: module(packed, kind="scores"), streams
            )

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[int, ScoreResult]]:
        """Results of this rank's share of ``requests``, with their positions.

        Every rank gets all requests and makes the same schedule, so that each enters every forward pass.
        """
        return self.scorer.score(requests, self._scores_of_share, rank=self.rank)

    def _scores_of_share(self, sequences: Sequence[Sequence[int]]) -> tuple[list[Part], dict[int, str]]:
        ranks_meet = self.streams is None and self.world_size > 1
        packs = scoring_packs(
            sequences,
            rank=self.rank,
            ranks=self.world_size,
            threads=1 if self.streams is None else self.streams.threads,
            ranks_meet=ranks_meet,
            max_tokens=self.settings.max_tokens,
        )
        batch = TrajectoryBatch.from_sequences(sequences)
        if ranks_meet:  # a rank that tried again alone would wait for the others for ever
            return self.scores(batch, packs), {}
        return score_apart(
            packs,
            lambda some: self.scores(batch, some, self.streams),
            lambda: self.scores(TrajectoryBatch.from_sequences([[0]]), [(0,)]),
        )


class VllmRewardWorker(Worker):
    """The reward model in vLLM's pooling runner: one rank, and the model is loaded nowhere else."""

    role = "reward"

    def setup(self, setup: RewardSetup) -> str:
        """Load the model; returns one line about it."""
        from rlhf_ray.models import load_tokenizer
        from rlhf_ray.models.devices import placed_device
        from rlhf_ray.rollout.vllm_scorer import VllmScorer

        resources = setup.config.resources
        device = placed_device(resources, self.role)  # vLLM keeps to a share of its own
        environment.prepare(variables_at(LOOPBACK))
        model = setup.config.model
        tokenizer = load_tokenizer(model)
        share = min(resources.gpus_per_rank, 1.0) or 1.0
        self.runner = VllmScorer(model, max_item_tokens=setup.max_item_tokens, device=device, share=share)
        reading = None if self.runner.encoder else scoring_reading(setup, tokenizer, self.rank)
        scorer = TextPairScorer if self.runner.encoder else RequestScorer
        self.scorer = scorer(
            tokenizer,
            self.runner.config,
            reading=reading,
            vocabulary=self.runner.vocabulary,
            max_item_tokens=self.runner.max_item_tokens,
            max_item_bytes=setup.max_item_bytes,
            refuse_markers=setup.refuse_markers,
        )
        self.phase = "ready"
        how = "" if reading is None else f", {reading.sentence()}"
        return f"{model.path}: reward in vLLM's pooling runner, {model.dtype}{how}"

    def describe(self) -> dict[str, Any]:
        """What callers must know of this model: its tokenizer and template, how it reads, its limit, and its mean and std."""
        return self.scorer.describe()

    def scores(self, batch: TrajectoryBatch, micro_batches: Sequence[MicroBatch]) -> list[Part]:
        """One score per sequence, read at its last token."""
        rows = tuple(index for micro_batch in micro_batches for index in micro_batch)
        chosen = batch.select(rows)
        with self.doing("score"):
            return [self._scores([ids.tolist() for ids in chosen["token_ids"].split(chosen.lengths.tolist())], rows)]

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[int, ScoreResult]]:
        """Results of ``requests``, with their positions."""
        with self.doing("score"):
            return self.scorer.score(requests, self._scores_apart, rank=self.rank)

    def _scores_apart(self, sequences: Sequence[Sequence[int]]) -> tuple[list[Part], dict[int, str]]:
        return score_apart(
            [tuple(range(len(sequences)))],
            lambda packs: [self._scores([sequences[i] for i in pack], pack) for pack in packs],
            lambda: self.runner.scores([[0]]),
        )

    def _scores(self, sequences: Sequence[Sequence[int]], indices: MicroBatch) -> Part:
        return indices, np.asarray(self.runner.scores(sequences), dtype=np.float32)
