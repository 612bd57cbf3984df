"""Run the last layer only for the tokens whose hidden state is read, and run norms and MLPs in cache-sized parts.

Invariants: in a model that runs each layer once, and its last norm once behind them, the hidden states of the tokens that are
read, and every gradient, are those of the whole pass. The hidden states of other tokens are finite and otherwise undefined.
Afterwards the modules are what they were. Who calls this tries first whether the model is one of these.

A policy reads the tokens before the sampled ones, and a critic as well: there the last layer attends for all tokens, and what
stands behind its attention runs for those alone (:func:`narrow_behind_attention`).

A reward model reads one token per sequence. The last layer needs the keys and values of every token, but queries, attention
outputs, the output projection and the MLP only for those tokens. In a model of six layers this saves a seventh of all
matrix products, forward and backward. Without gradients, on CPU, the norms and MLPs of all layers run on some of the tokens
at a time: their intermediate results are several times as wide as their input and would not fit into the cache.
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
from rlhf_ray.trajectories.packing import Packed

ATTENTION = "self_attn"
LAST_LAYER = ("post_attention_layernorm", "mlp", f"{ATTENTION}.q_proj", f"{ATTENTION}.o_proj")
"""Modules of the last layer, by their names in transformers, that run only for the tokens that are read. A model that lacks
one of these names runs that part for all tokens."""
BEHIND_ATTENTION = ("post_attention_layernorm", "mlp", f"{ATTENTION}.o_proj")
"""Those of them that come after the attention itself."""
FINAL_NORM = "norm"
"""The module behind the last layer, which also runs only for the tokens that are read."""
IN_PARTS = ("mlp", "input_layernorm", "post_attention_layernorm")
"""Modules of every layer that run on some of the tokens at a time."""
NUMBERS_AT_ONCE = 1 << 19
"""Size of the widest intermediate result of a part (tokens times width): a few such matrices fit into a core's cache."""
FEWEST_TOKENS_AT_ONCE = 256
"""Smallest part, in tokens: with fewer, reading the weights would take longer than the products."""

Forward = Callable[..., Any]


@contextmanager
def narrow_last_layer(backbone: PreTrainedModel, packed: Packed) -> Iterator[None]:
    """Within this context the backbone computes only what the last hidden states of the last token of each sequence need.

    Checkpointed layers run for all tokens, since the backward pass calls them again after this context has ended.
    """
    with ExitStack() as replacements:
        for module, forward in _narrowed_modules(backbone, packed):
            replacements.enter_context(_replace_forward(module, forward))
        yield


@contextmanager
def narrow_behind_attention(backbone: PreTrainedModel, read: Int64[Tensor, "read"]) -> Iterator[None]:
    """Within this context what follows the last attention runs only for the tokens ``read``, each named once.

    The same with gradients and without, so that both passes give the same bits. Not for a model with checkpointed layers, nor
    for one whose last layer has experts.
    """
    last = decoder_layers(backbone)[-1]
    modules = [module for name, module in last.named_modules() if name in BEHIND_ATTENTION]
    norm = getattr(backbone, FINAL_NORM, None)
    with ExitStack() as replacements:
        for module in modules if norm is None else [*modules, norm]:
            replacements.enter_context(_replace_forward(module, _token_by_token(module.forward, read, None)))
        yield


def has_experts(backbone: PreTrainedModel) -> bool:
    """Whether the last layer is a mixture of experts."""
    return any(hasattr(module, "experts") for layer in decoder_layers(backbone)[-1:] for module in layer.modules())


def _narrowed_modules(backbone: PreTrainedModel, packed: Packed) -> Iterator[tuple[nn.Module, Forward]]:
    """Yield each module that runs otherwise than usual, with the function that takes the place of its forward."""
    tokens, with_gradients = packed.last_tokens, torch.is_grad_enabled()
    narrow = not (with_gradients and backbone.is_gradient_checkpointing)
    in_parts = not with_gradients and tokens.device.type == "cpu"
    layers = decoder_layers(backbone)
    for layer in layers:
        read = tokens if narrow and layer is layers[-1] else None
        for name, module in layer.named_modules():
            rows = read if name in LAST_LAYER else None
            part = _tokens_at_once(module) if in_parts and name in IN_PARTS else None
            if rows is not None or part is not None:
                yield module, _token_by_token(module.forward, rows, part)
            elif read is not None and name == ATTENTION:
                yield module, _attend_for(module.forward, packed.ends)
    norm = getattr(backbone, FINAL_NORM, None)
    if narrow and norm is not None:
        yield norm, _token_by_token(norm.forward, tokens, None)


def decoder_layers(backbone: PreTrainedModel) -> list[nn.Module]:
    """The layers of a backbone, from the first one on."""
    stacks = (module for name, module in backbone.named_modules() if name.endswith("layers"))
    return list(next(stacks, nn.ModuleList()).children())


def _tokens_at_once(module: nn.Module) -> int | None:
    """Choose the size of a part of the tokens, or None for a module that runs faster on all of them at once.

    Those are mixtures of experts, whose experts would get too few tokens, and layers in 4 bits, which unpack their weight in
    every call.
    """
    weights = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    if hasattr(module, "experts") or len(weights) < len(list(module.parameters())):
        return None
    widest = max((max(weight.shape) for weight in weights), default=1)
    return max(FEWEST_TOKENS_AT_ONCE, NUMBERS_AT_ONCE // widest)


def _token_by_token(forward: Forward, read: Int64[Tensor, "read"] | None, part: int | None) -> Forward:
    """Wrap the forward of a module that treats each token alone.

    It runs for the rows of ``read`` (None: all) and leaves zeros elsewhere, ``part`` rows at a time (None: all at once).
    """

    def token_by_token(hidden: Float[Tensor, "1 tokens width"]) -> Float[Tensor, "1 tokens out"]:
        rows = hidden if read is None else hidden.index_select(1, read)
        out = forward(rows) if part is None else torch.cat([forward(some[None]) for some in rows[0].split(part)], 1)
        return out if read is None else out.new_zeros(1, hidden.shape[1], out.shape[-1]).index_copy(1, read, out)

    return token_by_token


def _attend_for(forward: Forward, tokens: tuple[int, ...]) -> Forward:
    """Wrap the forward of a layer's attention so that only ``tokens`` attend."""

    def attend(*args: Any, packed_segments: Segments, **options: Any) -> Any:
        packed_segments.read = tokens
        try:
            return forward(*args, packed_segments=packed_segments, **options)
        finally:
            packed_segments.read = None

    return attend


@contextmanager
def _replace_forward(module: nn.Module, forward: Forward) -> Iterator[None]:
    own = vars(module).get("forward")  # set on the instance by someone else; usually only the class has one
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own
