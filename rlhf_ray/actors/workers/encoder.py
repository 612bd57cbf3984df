"""The worker of a reward model that is an encoder: transformers' own forward pass over padded batches of similar lengths.

Invariants: as of every reward worker, a score does not depend on what else was asked for, nor on which rank computed it; every
request ends in one result. Ranks share nothing but the requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf_ray.actors.workers.base import Worker
from rlhf_ray.actors.workers.model import Part
from rlhf_ray.actors.workers.request_scoring import TextPairScorer, score_apart
from rlhf_ray.actors.workers.reward import RewardSetup
from rlhf_ray.environment import keep_freed_memory
from rlhf_ray.models.devices import CPU
from rlhf_ray.planning.colocation.phases import Level
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.schedule import MicroBatch


class EncoderRewardWorker(Worker):
    """The reward model, without an engine."""

    role = "reward"

    def setup(self, setup: RewardSetup) -> str:
        """Load the model; returns one line about it."""
        from rlhf_ray.models import load_tokenizer
        from rlhf_ray.models.encoders import Encoder

        resources = setup.config.resources
        device = self.take_device(resources)
        torch.set_num_threads(resources.threads_per_rank)
        keep_freed_memory()
        self.settings = setup
        tokenizer = load_tokenizer(setup.config.model)
        self.encoder = Encoder(setup.config.model, tokenizer, device)
        self.scorer = TextPairScorer(
            tokenizer,
            self.encoder.config,
            vocabulary=self.encoder.vocabulary,
            max_item_tokens=min(setup.max_item_tokens, self.encoder.positions or setup.max_item_tokens),
            max_item_bytes=setup.max_item_bytes,
            refuse_markers=setup.refuse_markers,
        )
        self.phase = "ready"
        return f"{setup.config.model.path}: {self.encoder.describe()}"

    def go_to(self, level: int) -> None:
        """Have the model on the device, or on the host below ``Level.ALL`` of ``planning/colocation/phases.py``."""
        with self.doing("go_to"):
            self.encoder.model.to(self.encoder.device if level == Level.ALL else CPU)
            if self.encoder.device.type == "cuda":
                torch.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        """What callers must know of this model: its tokenizer, its limit, its mean and std if it normalises."""
        return self.scorer.describe()

    def scores(self, batch: TrajectoryBatch, micro_batches: Sequence[MicroBatch]) -> list[Part]:
        """One score per sequence of this rank's share."""
        rows = [index for micro_batch in micro_batches for index in micro_batch]
        sequences = [ids.tolist() for ids in batch["token_ids"].split(batch.lengths.tolist())]
        batches = self._batches([len(sequences[index]) for index in rows])
        with self.doing("score"):
            return self._scores(sequences, [tuple(rows[i] for i in one) for one in batches])

    def score(self, requests: Sequence[ScoreRequest]) -> list[tuple[int, ScoreResult]]:
        """Results of this rank's share of ``requests``, with their positions; every rank gets all of them."""
        with self.doing("score"):
            return self.scorer.score(requests, self._scores_of_share, rank=self.rank)

    def _scores_of_share(self, sequences: Sequence[Sequence[int]]) -> tuple[list[Part], dict[int, str]]:
        share = self._batches(list(map(len, sequences)))[self.rank :: self.world_size]
        if not share:
            return [], {}
        return score_apart(share, lambda batches: self._scores(sequences, batches), lambda: self.encoder.scores([[0]]))

    def _batches(self, lengths: Sequence[int]) -> list[MicroBatch]:
        return self.encoder.batches(lengths, max_tokens=self.settings.max_tokens)

    def _scores(self, sequences: Sequence[Sequence[int]], batches: Sequence[MicroBatch]) -> list[Part]:
        return [(batch, self.encoder.scores([sequences[index] for index in batch]).cpu().numpy()) for batch in batches]
