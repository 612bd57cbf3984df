"""The worker of a reward model in training: it learns from pairs, measures its cost, and checks what it has saved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from rlhf_ray.actors.workers.model import Loss
from rlhf_ray.actors.workers.reward import RewardSetup, RewardWorker
from rlhf_ray.engine.optimizer import full_shape
from rlhf_ray.planning.flops import ComputeShape
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import Packed

if TYPE_CHECKING:
    from rlhf_ray.models.reward_reading import RewardReading


@dataclass(frozen=True)
class TrainedRewardSetup(RewardSetup):
    """What a reward model needs besides to be trained."""

    routers: bool = False
    """Whether the loss reads how the routers of a mixture of experts use their experts."""


class TrainedRewardWorker(RewardWorker):
    """The reward model in training: always read at the end of an answer, with which it therefore does not pad."""

    def _reading(self, setup: RewardSetup) -> RewardReading:
        from rlhf_ray.models.reward_reading import answer_ends, training_reading
        from rlhf_ray.models.weights.tokenizer import add_pad_token

        add_pad_token(self.tokenizer, ends=answer_ends(self.tokenizer))
        return training_reading(self.tokenizer)

    def _outputs(self, module: torch.nn.Module, packed: Packed, sequences: TrajectoryBatch | None, loss: Loss) -> Any:
        settings = cast(TrainedRewardSetup, self.settings)
        return module(packed, kind="routed_scores" if settings.routers else "scores")

    def save_adapter(self, directory: str, metadata: dict[str, Any] | None = None) -> None:
        """The LoRA adapter and the head alone, without the base, written by rank 0; every rank takes part."""
        from rlhf_ray.models import save_adapter
        from rlhf_ray.models.save import in_adapter

        weights = (pair for group in self.engine.full_state(self.hf_model) for pair in group)
        trained = [(name, tensor) for name, tensor in weights if in_adapter(self.model, name)]
        if self.rank == 0:
            save_adapter(self.model, self.tokenizer, directory, tensors=trained, metadata=metadata)

    def scores_on_disk(self, directory: str, batch: TrajectoryBatch) -> list[float]:
        """The scores that the model saved in ``directory`` gives to ``batch``.

        Rank 0 loads it as a user would; the other ranks return nothing.
        """
        from rlhf_ray.models.reread import score_directory

        if self.rank != 0:
            return []
        with self.doing("score"):
            return score_directory(directory, self.config.model, batch, self.device)

    def compute_shape(self) -> ComputeShape:
        """What a token of this model costs."""
        return compute_shape(self.model.backbone)

    def matmul_rate(self) -> float:
        """FLOP/s of a large matrix product on this rank, now, in the precision that it computes in."""
        from rlhf_ray.engine.matmul_rate import matmul_rate
        from rlhf_ray.models.dtypes import DTYPES

        return matmul_rate(DTYPES[self.config.model.dtype], self.device)


def compute_shape(backbone: Any) -> ComputeShape:
    """The matrices of a transformer without its input embeddings, which are looked up and not multiplied."""
    text = backbone.config.get_text_config()
    embeddings = {id(parameter) for parameter in backbone.get_input_embeddings().parameters()}
    shapes = [(full_shape(p), p.requires_grad) for p in backbone.parameters() if id(p) not in embeddings]
    matrices = [(shape.numel(), trains) for shape, trains in shapes if len(shape) > 1]
    layers = text.per_layer_config if text.is_heterogeneous else [text]
    return ComputeShape(
        parameters=sum(size for size, _ in matrices),
        trained=sum(size for size, trains in matrices if trains),
        layers=text.num_hidden_layers,
        width=sum(map(_attention_width, layers)) // len(layers),
    )


def _attention_width(layer: Any) -> int:
    """The width of all heads of a layer together; ``layer`` is its config."""
    head_width: int = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
    return int(layer.num_attention_heads) * head_width
