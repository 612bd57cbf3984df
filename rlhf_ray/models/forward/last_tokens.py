"""Running what treats each token alone for the tokens that are read, and in parts that stay in the cache.

Always true: the hidden states of the tokens that are read, and every gradient, are those of the whole pass; the hidden
states of the others are finite, and nothing else is promised of them; afterwards the modules are what they were.

A score is read at one token a sequence. The last layer's keys and values come from every token, but its queries, what they
attend to, its projection and the MLP only from those: in a model of six layers a seventh of all products, forward and
backward. Without gradients, on CPU, norms and MLPs of all layers run in parts: what they compute in between
is several times as wide as their input, and would go through memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ray.models.forward.segments import Segments
from rlhf_ray.models.forward.shards import in_shards

ATTENTION = "self_attn"
LAST_LAYER = ("post_attention_layernorm", "mlp", f"{ATTENTION}.q_proj", f"{ATTENTION}.o_proj")
"""Modules, by transformers' names, that the last layer needs for tokens that are read; one that a model lacks runs whole."""
FINAL_NORM = "norm"
"""The module behind the last layer, for which the same is true."""
IN_PARTS = ("mlp", "input_layernorm", "post_attention_layernorm")
"""Modules of every layer that run in parts."""
NUMBERS_AT_ONCE = 1 << 19
"""Tokens of a part times the widest that they get: a few such matrices fit into the cache of a core."""
FEWEST_TOKENS_AT_ONCE = 256
"""Fewer would read the weights for next to nothing."""

Forward = Callable[..., Any]


@contextmanager
def reading(backbone: PreTrainedModel, tokens: Int64[Tensor, "read"]) -> Iterator[None]:
    """Within it, the backbone computes what the last hidden states of ``tokens`` need.

    Checkpointed layers run whole: the backward pass calls them again when this has ended. Models in shards run in one
    part: their ranks meet in every call of a module.
    """
    trained = torch.is_grad_enabled()
    layers = next((module for name, module in backbone.named_modules() if name.endswith("layers")), nn.ModuleList())
    for_read = () if trained and backbone.is_gradient_checkpointing else LAST_LAYER
    in_parts = () if trained or tokens.device.type != "cpu" or in_shards(backbone) else IN_PARTS
    with ExitStack() as changed:
        for number, layer in enumerate(layers.children(), start=1):
            for name, module in layer.named_modules():
                read = tokens if name in for_read and number == len(layers) else None
                part = _tokens_at_once(module) if name in in_parts else None
                if read is not None or part is not None:
                    changed.enter_context(_other_forward(module, _token_by_token(module.forward, read, part)))
                if for_read and name == ATTENTION and number == len(layers):
                    changed.enter_context(_other_forward(module, _attending(module.forward, tokens)))
        norm = getattr(backbone, FINAL_NORM, None)
        if for_read and norm is not None:
            changed.enter_context(_other_forward(norm, _token_by_token(norm.forward, tokens, None)))
        yield


def _tokens_at_once(module: nn.Module) -> int | None:
    """None where parts would cost more than they save: experts get too few tokens, 4-bit weights are unpacked in each."""
    weights = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    if hasattr(module, "experts") or len(weights) < len(list(module.parameters())):
        return None
    widest = max((max(weight.shape) for weight in weights), default=1)
    return max(FEWEST_TOKENS_AT_ONCE, NUMBERS_AT_ONCE // widest)


def _token_by_token(forward: Forward, read: Int64[Tensor, "read"] | None, part: int | None) -> Forward:
    """``forward`` for the rows of ``read``, put back among zeros (None: for all), ``part`` rows at a time (None: all)."""

    def token_by_token(hidden: Float[Tensor, "1 tokens width"]) -> Float[Tensor, "1 tokens out"]:
        rows = hidden if read is None else hidden.index_select(1, read)
        out = forward(rows) if part is None else torch.cat([forward(some[None]) for some in rows[0].split(part)], 1)
        return out if read is None else out.new_zeros(1, hidden.shape[1], out.shape[-1]).index_copy(1, read, out)

    return token_by_token


def _attending(forward: Forward, tokens: Int64[Tensor, "read"]) -> Forward:
    """``forward`` of a layer's attention, which computes what ``tokens`` attend to."""

    def attending(*args: Any, packed_segments: Segments, **given: Any) -> Any:
        packed_segments.read = tokens
        try:
            return forward(*args, packed_segments=packed_segments, **given)
        finally:
            packed_segments.read = None

    return attending


@contextmanager
def _other_forward(module: nn.Module, forward: Forward) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
