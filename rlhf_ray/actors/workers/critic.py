"""Workers with a model that gives one number: what they share, and the critic, which estimates the value of a state."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch

from rlhf_ray.actors.workers.model import Loss, ModelWorker, Part, Setup, WorkerSetup, sampled_tokens
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import Packed
from rlhf_ray.trajectories.schedule import MicroBatch


class RegressionWorker(ModelWorker[Setup]):
    """A transformer with a scalar head."""

    model_type: Literal["critic", "reward"]

    def _load(self, setup: Setup) -> tuple[torch.nn.Module, str]:
        from rlhf_ray.models import PackedRegression, load_regression
        from rlhf_ray.models.description import describe

        self.model = load_regression(
            setup.config.model,
            self.model_type,
            device=self.device,
            ds_config=self._ds_config(setup),
            seed=setup.seed,
            tokenizer=self.tokenizer,
        )
        return PackedRegression(self.model), describe(self.model)

    @property
    def hf_model(self) -> Any:
        return self.model


class CriticWorker(RegressionWorker[WorkerSetup]):
    """The value of the state in which each token was chosen."""

    role = "critic"
    model_type = "critic"

    def _outputs(self, module: torch.nn.Module, packed: Packed, sequences: TrajectoryBatch | None, loss: Loss) -> Any:
        return module(packed, kind="values", wanted=None if sequences is None else sampled_tokens(sequences))

    def values(self, batch: TrajectoryBatch, micro_batches: Sequence[MicroBatch]) -> list[Part]:
        """The value at every token of this rank's sequences; undefined where no action was chosen."""
        with self.doing("values"):
            return [part for one in micro_batches for part in self._values_of_pack(batch, one)]

    def _values_of_pack(self, batch: TrajectoryBatch, micro_batch: MicroBatch) -> list[Part]:
        wanted = self._sampled(batch, micro_batch)
        return self.forward_parts(
            batch, [micro_batch], lambda module, packed: module(packed, kind="values", wanted=wanted)
        )
