"""Workers with a language model: the policy that is trained, and the frozen reference that it is compared with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_ray.actors.workers.model import ModelWorker, Part, WorkerSetup
from rlhf_ray.rollout.wire import Bucket, PublishedWeights
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import Packed
from rlhf_ray.trajectories.schedule import MicroBatch


@dataclass(frozen=True)
class LanguageSetup(WorkerSetup):
    """What the policy and the reference need besides."""

    temperature: float = 1.0
    """The sampling temperature, at which log-probs are computed."""


class ReferenceWorker(ModelWorker[LanguageSetup]):
    """The frozen policy that KL is measured against."""

    role = "reference"

    def _load(self, setup: LanguageSetup) -> tuple[torch.nn.Module, str]:
        from rlhf_ray.models import PackedPolicy, load_policy
        from rlhf_ray.models.description import describe

        self.actor = load_policy(
            setup.config.model, device=self.device, ds_config=self._ds_config(setup), seed=setup.seed
        )
        return PackedPolicy(self.actor), describe(self.actor)

    @property
    def hf_model(self) -> Any:
        return self.actor.model

    def log_probs(self, batch: TrajectoryBatch, micro_batches: Sequence[MicroBatch]) -> list[Part]:
        """log p(token t | tokens before t) at the sampling temperature, for every token of this rank's sequences."""
        temperature = self.settings.temperature
        with self.doing("log_probs"):
            return self.forward_parts(
                batch, micro_batches, lambda module, packed: module(packed, temperature=temperature).log_probs
            )


class PolicyWorker(ReferenceWorker):
    """The policy: log-probs as the reference computes them, training, and its weights for the rollout engines."""

    role = "policy"

    def _outputs(self, module: torch.nn.Module, packed: Packed) -> Any:
        return module(packed, temperature=self.settings.temperature, with_entropy=True)

    def publish_weights(self, version: int) -> PublishedWeights | None:
        """All weights by their names on disk, in buckets with a checksum, on rank 0; the other ranks take part.

        They must not change before the engines have taken them: no bucket is a copy unless :meth:`keep_bucket` makes one.
        """
        from rlhf_ray.rollout.wire import publish

        with self.doing("publish_weights"):
            published = publish(version, self.engine.disk_weights_in_place(self.hf_model), keep=self.keep_bucket)
        return published if self.rank == 0 else None

    def keep_bucket(self, bucket: Bucket) -> Any:
        """Keep a bucket until the engines have taken it; returns what they find it by: itself in the same process."""
        return bucket
