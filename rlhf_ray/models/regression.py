"""Reward models and critics: a causal language model whose output layer is a head that computes one number.

Invariants: the score of a sequence is read at its last attended token, which the attention mask or the offsets of a pack
determine, whatever the padding side and the pad id. Scores and values are fp32.

:class:`RewardModel` and :class:`CriticModel` work on padded batches with OpenRLHF's conventions. :class:`PackedRegression`
works on packs with the alignment of this project: ``values[t]`` is the value of the state in which token t was chosen.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ray.algorithms.reward_losses import RewardOutputs, router_balance
from rlhf_ray.errors import ModelLoadError, RequestError
from rlhf_ray.models.description import ModelFacts
from rlhf_ray.models.forward.packed import (
    distinct,
    last_token_forward,
    packed_forward,
    pad_back,
    padded_positions,
    read_forward,
    routed_forward,
    unpad,
)
from rlhf_ray.models.forward.rotation import share_alike
from rlhf_ray.models.heads import Head
from rlhf_ray.models.weights.checkpoint import HEAD_NAME
from rlhf_ray.models.weights.lora import adapted_layers
from rlhf_ray.trajectories.packing import Packed


class SequenceRegression(nn.Module):
    """A backbone under its usual name (mostly ``model``) and a head under the name ``value_head_prefix``.

    Where that name has dots, which no module's name can have, the head is called ``score``.
    ``normalization`` is the mean and standard deviation of raw scores that scores are normalised with.
    """

    role: str
    normalizes_in_training: bool
    """Whether scores are normalised in training mode too; in evaluation they always are."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        head: Head,
        *,
        value_head_prefix: str = "score",
        score_bias: float = 0.0,
        normalization: tuple[float, float] | None = None,
        packing_samples: bool = False,
    ) -> None:
        super().__init__()
        self.backbone_name = backbone.base_model_prefix
        self.add_module(self.backbone_name, backbone)
        if value_head_prefix == self.backbone_name:
            raise ModelLoadError(
                f"value_head_prefix is {value_head_prefix}, which is the name of the model itself: name its score head"
            )
        self.value_head_prefix = HEAD_NAME if "." in value_head_prefix else value_head_prefix
        self.add_module(self.value_head_prefix, head)
        self.score_bias = score_bias
        self.normalization, self.packing_samples = normalization, packing_samples
        self.attention: str = "sdpa"
        self.attention_note: str | None = None
        self.head_origin = "from the caller"

    @property
    def backbone(self) -> PreTrainedModel:
        """The transformers model without the head."""
        return cast(PreTrainedModel, self.get_submodule(self.backbone_name))

    @property
    def head(self) -> Head:
        """What computes one number from a hidden state."""
        return cast(Head, self.get_submodule(self.value_head_prefix))

    @property
    def config(self) -> Any:
        """The config of the backbone."""
        return self.backbone.config

    def get_input_embeddings(self) -> Any:
        """Return the input embedding of the backbone."""
        return self.backbone.get_input_embeddings()

    def facts(self) -> ModelFacts:
        """Return what the line on loading says of this model in particular."""
        bias = f", bias {self.score_bias:.4g}" if self.score_bias else ""
        return ModelFacts(
            role=self.role,
            inner=self.backbone,
            head=f"head {self.value_head_prefix} fp32 ({self.head_origin}{bias})",
            attention=self.attention,
            attention_note=self.attention_note,
            normalization=(
                "not normalised"
                if self.normalization is None
                else "normalised by mean {:.4g}, std {:.4g}".format(*self.normalization)
            ),
        )

    def regress(self, hidden: Float[Tensor, "*rows hidden"]) -> Float[Tensor, "*rows"]:
        """Apply the head, its bias, and the normalisation if it applies in this mode."""
        raw: Tensor = self.head(hidden) + self.score_bias
        if self.normalization is None or (self.training and not self.normalizes_in_training):
            return raw
        mean, deviation = self.normalization
        return (raw - mean) / deviation

    def padded_hidden(
        self, input_ids: Int64[Tensor, "batch length"], attended: Tensor, *, with_output: bool
    ) -> tuple[Any, Float[Tensor, "batch length hidden"]]:
        """Run a padded batch; return the backbone's output (None if it ran packed) and the hidden states."""
        if self.packing_samples and not with_output:
            packed, places = unpad(input_ids, attended)
            return None, pad_back(packed_forward(self.backbone, packed), places, *input_ids.shape)
        output = self.backbone(
            input_ids=input_ids, attention_mask=attended, position_ids=padded_positions(attended), use_cache=False
        )
        return output, output.last_hidden_state

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Recompute layers in the backward pass instead of keeping their activations (non-reentrant by default)."""
        self.backbone.gradient_checkpointing_enable(gradient_checkpointing_kwargs or {"use_reentrant": False})
        if adapted_layers(self.backbone):
            self.backbone.enable_input_require_grads()  # a reentrant pass drops gradients where no input has one

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations for the backward pass."""
        self.backbone.gradient_checkpointing_disable()


class RewardModel(SequenceRegression):
    """One score per sequence. Normalises in evaluation mode only, since a loss on pairs needs raw scores."""

    role = "reward"
    normalizes_in_training = False

    def forward(
        self,
        input_ids: Int64[Tensor, "batch length"],
        attention_mask: Tensor | None = None,
        return_output: bool = False,
        ring_attn_group: Any = None,
        packed_seq_lens: Any = None,
    ) -> Any:
        """Return scores (batch,), read at the last attended token; with ``return_output`` (scores, backbone's output)."""
        _refuse_ring(ring_attn_group, packed_seq_lens)
        attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        output, hidden = self.padded_hidden(input_ids, attended, with_output=return_output)
        last = input_ids.shape[1] - 1 - attended.flip(1).to(torch.uint8).argmax(1)
        scores = self.regress(hidden[torch.arange(len(last), device=last.device), last])
        return (scores, output) if return_output else scores


class CriticModel(SequenceRegression):
    """One value per token. Normalises always, since it learns the returns of normalised rewards."""

    role = "critic"
    normalizes_in_training = True

    def forward(
        self,
        input_ids: Int64[Tensor, "batch length"],
        action_mask: Tensor | None = None,
        attention_mask: Tensor | None = None,
        return_output: bool = False,
        ring_attn_group: Any = None,
        values_allgather: bool = False,
        packed_seq_lens: Any = None,
    ) -> Any:
        """Return the values of the last predictions times ``action_mask`` (batch, actions), or the backbone's output.

        The output is returned without ``action_mask``, and with ``return_output`` as the second of a pair.
        """
        _refuse_ring(ring_attn_group, packed_seq_lens, values_allgather)
        if action_mask is None and not return_output:
            raise RequestError("a critic's forward needs action_mask, or return_output=True for the backbone's output")
        attended = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        output, hidden = self.padded_hidden(input_ids, attended, with_output=return_output)
        if action_mask is None:
            return output
        values = self.regress(hidden[:, :-1])[:, -action_mask.shape[1] :] * action_mask.float()
        return (values, output) if return_output else values


class PackedRegression(nn.Module):
    """A reward model or critic that runs on packs. This is the module that an engine trains."""

    def __init__(self, model: SequenceRegression) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        packed: Packed,
        kind: Literal["values", "scores", "routed_scores"],
        wanted: Bool[Tensor, "sequence_tokens"] | None = None,
    ) -> Float[Tensor, "tokens or sequences"] | RewardOutputs:
        """Return what ``kind`` names.

        ``scores``: one per sequence, at its last token. ``routed_scores``: the same, and how evenly the routers of a mixture
        use their experts. ``values``: one per token of each sequence, the value of the state in which the token was chosen; 0
        at the first token, and undefined where ``wanted`` is False (None: True everywhere).
        """
        packed = share_alike(self.model.config, packed)
        if kind == "routed_scores":
            hidden, logits = routed_forward(self.model.backbone, packed)
            top_k = self.model.config.get_text_config().num_experts_per_tok
            scores = self.model.regress(hidden.index_select(0, packed.last_tokens))
            return RewardOutputs(scores, router_balance(logits, top_k))
        if kind == "scores":
            return self.model.regress(last_token_forward(self.model.backbone, packed))
        if kind != "values":
            raise RequestError(f"unknown kind {kind!r}: choose values, scores or routed_scores")
        if wanted is None:
            hidden = packed_forward(self.model.backbone, packed)
        else:
            before = packed.previous_tokens[packed.sequence_tokens[wanted]]
            hidden = read_forward(self.model.backbone, packed, distinct(before[before >= 0], packed.num_tokens))
        before = self.model.regress(hidden).index_select(0, packed.previous_tokens.clamp(min=0))
        return packed.per_sequence(before * (packed.previous_tokens >= 0))


def _refuse_ring(ring_attn_group: Any, packed_seq_lens: Any, allgather: bool = False) -> None:
    if allgather or ring_attn_group is not None or packed_seq_lens is not None:
        raise RequestError(
            "ring attention (ring_attn_group, values_allgather, packed_seq_lens) is not supported: leave "
            "these arguments out"
        )
