"""Reward models and critics: a causal language model whose output layer is a head that computes one number.

Invariants: the score of a sequence is read at its last attended token, which the attention mask or the offsets of a pack
determine, whatever the padding side and the pad id. Scores and values are fp32. A head was loaded, or a fresh one was
explicitly asked for.

:class:`RewardModel` and :class:`CriticModel` work on padded batches with OpenRLHF's conventions. :class:`PackedRegression`
works on packs with the alignment of this project: ``values[t]`` is the value of the state in which token t was chosen.
"""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from rlhf_ray.algorithms.reward_losses import RewardOutputs, router_balance
from rlhf_ray.console import get_logger
from rlhf_ray.errors import ModelLoadError, RequestError
from rlhf_ray.models.description import ModelFacts, describe
from rlhf_ray.models.dtypes import torch_dtype
from rlhf_ray.models.forward.packed import (
    last_token_forward,
    packed_forward,
    pad_back,
    padded_positions,
    routed_forward,
    unpad,
)
from rlhf_ray.models.heads import (
    HeadInit,
    ScoreHead,
    adapter_head_name,
    find_head,
    fresh_head,
    head_tensors,
    read_adapter_head,
    read_head,
)
from rlhf_ray.models.weights.adapters import load_adapter, refuse_second_adapter
from rlhf_ray.models.weights.checkpoint import Checkpoint
from rlhf_ray.models.weights.embeddings import input_embedding
from rlhf_ray.models.weights.load import check_packing, load_weights, prepare_for_packs
from rlhf_ray.models.weights.lora import add_lora
from rlhf_ray.trajectories.packing import Packed

OUTPUT_LAYERS = {f"{layer}.{part}" for layer in ("lm_head", "embed_out", "output") for part in ("weight", "bias")}
"""Tensors of a causal language model that a reward model or critic does not need."""


class SequenceRegression(nn.Module):
    """A backbone under its usual name (mostly ``model``) and a head under the name ``value_head_prefix``.

    ``normalization`` is the mean and standard deviation of raw scores that scores are normalised with.
    """

    role: str
    normalizes_in_training: bool
    """Whether scores are normalised in training mode too; in evaluation they always are."""

    def __init__(
        self,
        backbone: PreTrainedModel,
        head: ScoreHead,
        *,
        value_head_prefix: str = "score",
        score_bias: float = 0.0,
        normalization: tuple[float, float] | None = None,
        packing_samples: bool = False,
    ) -> None:
        super().__init__()
        self.backbone_name = backbone.base_model_prefix
        self.add_module(self.backbone_name, backbone)
        self.add_module(value_head_prefix, head)
        self.value_head_prefix, self.score_bias = value_head_prefix, score_bias
        self.normalization, self.packing_samples = normalization, packing_samples
        self.attention: str = "sdpa"
        self.attention_note: str | None = None
        self.head_origin = "given"

    @property
    def backbone(self) -> PreTrainedModel:
        """The transformers model without the head."""
        return cast(PreTrainedModel, self.get_submodule(self.backbone_name))

    @property
    def head(self) -> ScoreHead:
        """The layer that computes one number from a hidden state."""
        return cast(ScoreHead, self.get_submodule(self.value_head_prefix))

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
        self, packed: Packed, kind: Literal["values", "scores", "routed_scores"]
    ) -> Float[Tensor, "tokens or sequences"] | RewardOutputs:
        """Return what ``kind`` names.

        ``scores``: one per sequence, at its last token. ``routed_scores``: the same, and how evenly the routers of a mixture
        use their experts. ``values``: one per token of each sequence, the value of the state in which the token was chosen; 0
        at the first token.
        """
        if kind == "routed_scores":
            hidden, logits = routed_forward(self.model.backbone, packed)
            top_k = self.model.config.get_text_config().num_experts_per_tok
            scores = self.model.regress(hidden.index_select(0, packed.last_tokens))
            return RewardOutputs(scores, router_balance(logits, top_k))
        if kind == "scores":
            return self.model.regress(last_token_forward(self.model.backbone, packed))
        if kind != "values":
            raise RequestError(f"unknown kind {kind!r}: choose values, scores or routed_scores")
        hidden = packed_forward(self.model.backbone, packed)
        before = self.model.regress(hidden).index_select(0, packed.previous_tokens.clamp(min=0))
        return packed.per_sequence(before * (packed.previous_tokens >= 0))


def get_llm_for_sequence_regression(
    model_name_or_path: str,
    model_type: str,
    *,
    param_dtype: str = "bf16",
    load_in_4bit: bool = False,
    lora_rank: int = 0,
    lora_alpha: float = 16,
    target_modules: str | list[str] | None = None,
    lora_dropout: float = 0,
    normalize_reward: bool = False,
    attn_implementation: str = "flash_attention_2",
    ds_config: dict[str, Any] | None = None,
    init_value_head: bool = False,
    value_head_prefix: str = "score",
    device_map: Any = None,
    packing_samples: bool = False,
    head_init: HeadInit = "inv_sqrt",
    seed: int = 0,
    revision: str | None = None,
    trust_remote_code: bool = False,
    strict_attention: bool = False,
) -> SequenceRegression:
    """Load a reward model (``model_type="reward"``) or a critic (``"critic"``).

    Reads a transformers ``*ForSequenceClassification`` directory, OpenRLHF's, TRL's value-head models, and with
    ``init_value_head`` any causal language model, which gets a fresh head of kind ``head_init`` drawn from ``seed``.
    Where ``ds_config`` asks for ZeRO-3 the backbone is built in shards, on all ranks together.
    """
    _class_for(model_type)
    checkpoint = Checkpoint.open(model_name_or_path, revision, trust_remote_code=trust_remote_code)
    refuse_second_adapter(model_name_or_path, checkpoint.adapter, lora_rank)
    raw = checkpoint.raw_config()
    prefix = raw.get("value_head_prefix", value_head_prefix)
    normalization = _read_normalization(raw, checkpoint, normalize_reward)
    _require_head(checkpoint, prefix, init_value_head)
    backbone = load_weights(
        AutoModel,
        checkpoint,
        torch_dtype(param_dtype),
        heads=OUTPUT_LAYERS | head_tensors(checkpoint) | {f"{prefix}.weight", f"{prefix}.bias"},
        ds_config=ds_config,
        device_map=device_map,
        trust_remote_code=trust_remote_code,
        load_in_4bit=load_in_4bit,
    )
    head, bias, origin = (
        _load_head(checkpoint, prefix, backbone)
        if not init_value_head
        else _make_fresh_head(checkpoint, prefix, backbone, head_init, seed)
    )
    model = wrap_backbone(
        backbone,
        head,
        model_type,
        value_head_prefix=prefix,
        head_origin=origin,
        packing_samples=packing_samples,
        score_bias=bias,
        normalization=normalization,
        attention=attn_implementation,
        strict_attention=strict_attention,
    )
    if checkpoint.adapter is not None:
        load_adapter(model.backbone, checkpoint.adapter, inside=f"{model.backbone_name}.")
    elif lora_rank:
        add_lora(model.backbone, rank=lora_rank, alpha=lora_alpha, dropout=lora_dropout, targets=target_modules)
    get_logger(__name__).info("%s: %s", model_name_or_path, describe(model))
    return model


def wrap_backbone(
    backbone: PreTrainedModel,
    head: ScoreHead,
    model_type: str,
    *,
    attention: str,
    strict_attention: bool,
    head_origin: str,
    value_head_prefix: str = "score",
    score_bias: float = 0.0,
    normalization: tuple[float, float] | None = None,
    packing_samples: bool = False,
) -> SequenceRegression:
    """Put a head on a backbone and make both ready to run packed.

    ``head_origin`` says where the head came from, for the line on loading.
    """
    backend, note = prepare_for_packs(backbone, attention, strict=strict_attention)
    check_packing(backbone, backbone)
    model = _class_for(model_type)(
        backbone,
        head.to(input_embedding(backbone).weight.device),
        value_head_prefix=value_head_prefix,
        score_bias=score_bias,
        normalization=normalization,
        packing_samples=packing_samples,
    )
    model.attention, model.attention_note, model.head_origin = backend, note, head_origin
    return model


def make_head(backbone: PreTrainedModel, init: HeadInit, seed: int) -> ScoreHead:
    """Make a fresh head for a backbone."""
    config = backbone.config.get_text_config()
    return fresh_head(config.hidden_size, init, initializer_range=config.initializer_range, seed=seed)


def _require_head(checkpoint: Checkpoint, prefix: str, init_value_head: bool) -> None:
    """Refuse a checkpoint without a head, before anything is loaded, unless a fresh head is asked for."""
    beside = checkpoint.adapter is not None and adapter_head_name(checkpoint.adapter) is not None
    if init_value_head or beside or find_head(checkpoint, prefix) is not None:
        return
    raise ModelLoadError(
        f"{checkpoint.adapter or checkpoint.directory} has no score head ({prefix}.weight), so it is no reward model "
        "or critic. Ask for a fresh head (init_value_head=True; in a config, head_init) or choose another checkpoint"
    )


def _load_head(checkpoint: Checkpoint, prefix: str, backbone: PreTrainedModel) -> tuple[ScoreHead, float, str]:
    """Load the head and its bias; also say where it was. A head beside the adapter comes first: both were trained together."""
    hidden = backbone.config.get_text_config().hidden_size
    if checkpoint.adapter is not None and adapter_head_name(checkpoint.adapter) is not None:
        return read_adapter_head(checkpoint.adapter, hidden), 0.0, "loaded with the adapter"
    name = find_head(checkpoint, prefix)
    assert name is not None  # _require_head has made sure of it
    head, bias = read_head(checkpoint, name, hidden)
    return head, float(checkpoint.raw_config().get("score_bias", bias)), f"loaded from {name}"


def _make_fresh_head(
    checkpoint: Checkpoint, prefix: str, backbone: PreTrainedModel, init: HeadInit, seed: int
) -> tuple[ScoreHead, float, str]:
    replaced = find_head(checkpoint, prefix)
    origin = f"fresh, {init}, seed {seed}" + (f", in place of {replaced}" if replaced else "")
    return make_head(backbone, init, seed), 0.0, origin


def _class_for(model_type: str) -> type[SequenceRegression]:
    classes: dict[str, type[SequenceRegression]] = {"reward": RewardModel, "critic": CriticModel}
    if model_type not in classes:
        raise ModelLoadError(f"unknown model_type {model_type!r}: choose reward or critic")
    return classes[model_type]


def _read_normalization(
    raw: dict[str, Any], checkpoint: Checkpoint, normalize_reward: bool
) -> tuple[float, float] | None:
    if not normalize_reward:
        return None
    if "mean" not in raw or "std" not in raw:
        raise ModelLoadError(
            f"normalize_reward is set, but {checkpoint.directory / 'config.json'} has no mean and "
            "std: train the reward model with this project, write them there, or leave it off"
        )
    if not raw["std"] > 0:
        raise ModelLoadError(f"std in {checkpoint.directory / 'config.json'} is {raw['std']}, but must be above 0")
    return float(raw["mean"]), float(raw["std"])


def _refuse_ring(ring_attn_group: Any, packed_seq_lens: Any, allgather: bool = False) -> None:
    if allgather or ring_attn_group is not None or packed_seq_lens is not None:
        raise RequestError(
            "ring attention (ring_attn_group, values_allgather, packed_seq_lens) is not supported: leave "
            "these arguments out"
        )
