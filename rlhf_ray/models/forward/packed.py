"""Run a model on a pack: many sequences in one row of tokens, without padding.

Training and scoring run models in this way only.

Invariants: the hidden states of a sequence are those of the sequence run alone, whatever prefix it shares with others. A
model whose attention cannot be packed safely is refused by its name rather than run wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf_ray.errors import ModelLoadError, RequestError
from rlhf_ray.models.forward.last_tokens import has_experts, narrow_behind_attention, narrow_last_layer
from rlhf_ray.models.forward.routing import replay
from rlhf_ray.models.forward.segments import Segments
from rlhf_ray.trajectories.packing import Packed

SUPPORTED_LAYERS = {"full_attention", "sliding_attention"}
"""Types of layers, as configs name them, that can run packed."""
NARROWS = "narrows_last_layer"
"""Attribute of a backbone: whether its last layer may run for the tokens that are read alone."""
NARROWED_TO = {torch.float32: 1e-4, torch.bfloat16: 0.02, torch.float16: 0.02}
"""Largest relative difference between the narrowed pass and the whole one with which a model is narrowed."""


def packed_forward(backbone: PreTrainedModel, packed: Packed) -> Float[Tensor, "tokens hidden"]:
    """Return the last hidden state of every token of the pack. Where it has ``routed``, tokens go to those experts."""
    hidden: Tensor = _run(backbone, packed).last_hidden_state[0]
    return hidden


def read_forward(
    backbone: PreTrainedModel, packed: Packed, read: Int64[Tensor, "read"]
) -> Float[Tensor, "tokens hidden"]:
    """Return the last hidden states, of which those of the tokens ``read`` alone are defined; each is named once.

    The last layer does the rest of its work for no others, where it can.
    """
    narrows = vars(backbone).get(NARROWS, False) and not backbone.is_gradient_checkpointing
    if not narrows or has_experts(backbone):
        return packed_forward(backbone, packed)
    with narrow_behind_attention(backbone, read):
        return packed_forward(backbone, packed)


def distinct(tokens: Int64[Tensor, "some"], of: int) -> Int64[Tensor, "read"]:
    """Return which of the tokens 0 to ``of`` are among ``tokens``, in order, each once."""
    return torch.zeros(of, dtype=torch.bool, device=tokens.device).index_fill(0, tokens, True).nonzero()[:, 0]


def last_token_forward(backbone: PreTrainedModel, packed: Packed) -> Float[Tensor, "sequences hidden"]:
    """Return the last hidden state of the last token of each sequence; the last layer computes no other where it can."""
    if not vars(backbone).get(NARROWS, False):
        return packed_forward(backbone, packed).index_select(0, packed.last_tokens)
    with narrow_last_layer(backbone, packed):
        return packed_forward(backbone, packed).index_select(0, packed.last_tokens)


@torch.no_grad()
def try_narrowing(backbone: PreTrainedModel, packed: Packed) -> None:
    """Let :func:`last_token_forward` narrow the last layer from now on, if that changes nothing for ``packed``.

    It does in a model that runs its last layer or its last norm more than once. A model in shards cannot be tried before an
    engine holds it, and is not narrowed.
    """
    vars(backbone)[NARROWS] = True
    whole = packed_forward(backbone, packed).index_select(0, packed.last_tokens)
    difference = float((last_token_forward(backbone, packed) - whole).float().norm() / whole.float().norm())
    vars(backbone)[NARROWS] = difference <= NARROWED_TO[whole.dtype]


def routed_forward(
    backbone: PreTrainedModel, packed: Packed
) -> tuple[Float[Tensor, "tokens hidden"], tuple[Float[Tensor, "tokens experts"], ...]]:
    """Return what :func:`packed_forward` does, and the logits of each layer's router, for a mixture of experts."""
    output = _run(backbone, packed, output_router_logits=True)
    if not output.get("router_logits"):
        raise RequestError(
            f"{type(backbone).__name__} has no routers, so its use of experts cannot be balanced: leave the router's loss out"
        )
    return output.last_hidden_state[0], output.router_logits


def _run(backbone: PreTrainedModel, packed: Packed, **options: bool) -> Any:
    segments = Segments.of_pack(packed)
    routing = {} if packed.routed is None else replay(backbone, packed.routed).arguments()
    output = backbone(
        input_ids=packed.token_ids[None],
        position_ids=packed.position_ids[None],
        attention_mask=_no_mask(packed.token_ids.device),
        use_cache=False,
        **segments.arguments(),
        **routing,
        **options,
    )
    _check_attended(backbone, segments)
    return output


def _no_mask(device: torch.device) -> Tensor:
    """Return a mask of four dimensions, which transformers passes on unchanged, and which no attention can apply.

    A registered backend knows the segments and ignores the mask. Attention that bypasses the backends fails on its shape.
    """
    return torch.empty(1, 1, 0, 0, dtype=torch.bool, device=device)


def check_packable(model: PreTrainedModel) -> None:
    """Refuse a model whose config or class already shows that its attention cannot be packed."""
    name, config = type(model).__name__, model.config.get_text_config()
    if not model.is_backend_compatible():
        raise ModelLoadError(
            f"{name} cannot be run packed: its attention does not go through transformers' attention "
            "interface. Choose another model"
        )
    unsupported = set(_layer_types(config)) - SUPPORTED_LAYERS
    if unsupported:
        raise ModelLoadError(
            f"{name} cannot be run packed: it has layers of type {', '.join(sorted(unsupported))}, and "
            f"packs support {', '.join(sorted(SUPPORTED_LAYERS))}. Choose another model"
        )


def _check_attended(backbone: PreTrainedModel, segments: Segments) -> None:
    """Compare what the layers did in this pass with what the config says about them."""
    config = backbone.config.get_text_config()
    layers = config.num_hidden_layers
    if segments.attended != layers:
        raise ModelLoadError(
            f"{type(backbone).__name__} cannot be run packed: {segments.attended} of its {layers} layers "
            "attended within the segments. Choose another model"
        )
    windows = _windowed_layers(config)
    if segments.windowed < windows:
        raise ModelLoadError(
            f"{type(backbone).__name__} cannot be run packed: {windows} of its layers have a sliding "
            f"window, but {segments.windowed} passed one to the attention. Choose another model"
        )


def _layer_types(config: PreTrainedConfig) -> list[str]:
    return list(config.layer_types or ()) if hasattr(config, "layer_types") else []


def _windowed_layers(config: PreTrainedConfig) -> int:
    types = _layer_types(config)
    everywhere = not types and hasattr(config, "sliding_window") and config.sliding_window is not None
    return config.num_hidden_layers if everywhere else types.count("sliding_attention")


def padded_positions(attention_mask: Tensor) -> Int64[Tensor, "batch length"]:
    """Number the positions from the first attended token of each row; padding gets position 1, as in transformers."""
    attended = attention_mask.long()
    return (attended.cumsum(1) - 1).masked_fill(attended == 0, 1)


def unpad(token_ids: Int64[Tensor, "batch length"], attention_mask: Tensor) -> tuple[Packed, Int64[Tensor, "tokens"]]:
    """Pack the attended tokens of a padded batch; also return the index of each in the flattened batch."""
    attended = attention_mask.bool()
    lengths = attended.sum(1)
    if not bool((lengths > 0).all()):
        raise RequestError(
            f"row {int((lengths == 0).nonzero()[0])} of the attention mask is all zeros: give every row "
            "at least one token"
        )
    places = attended.flatten().nonzero()[:, 0]
    positions = (attended.cumsum(1) - 1).flatten()[places]
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Packed(token_ids.flatten()[places], offsets, positions), places


def pad_back(
    tokens: Float[Tensor, "tokens hidden"], places: Int64[Tensor, "tokens"], batch: int, length: int
) -> Float[Tensor, "batch length hidden"]:
    """Put one result per token back where :func:`unpad` took the tokens from; padding is zero."""
    out = tokens.new_zeros(batch * length, tokens.shape[-1])
    return out.index_put((places,), tokens).view(batch, length, -1)
