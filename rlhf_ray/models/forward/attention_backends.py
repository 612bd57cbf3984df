"""Attention backends for packed input: which there are, which one this machine gets, how transformers calls them.

Always true: segments travel as the keyword arguments ``cu_seq_lens_q/k`` and ``max_length_q/k`` that transformers
hands to every registered attention function, and nothing is kept on a config; a kernel sees shared prefixes only if it
serves them, else every sequence whole; what a model asks for and a backend lacks (attention sinks, position biases,
dropout) is refused by name; calls without segments are ordinary padded attention; kernels come from installed packages,
never from a hub.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.forward.attention import segment_attention
from rlhf_ray.models.forward.segments import Segments

Kernel = Callable[..., Tensor]


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scaling: float, window: int | None, softcap: None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if softcap is not None:
        raise ModelLoadError("attention backend varlen cannot cap attention scores (softcap): set attention to sdpa")
    cuts, longest = segments.cu_seq_lens, segments.longest
    out: Any = varlen_attn(
        query,
        key,
        value,
        cuts,
        cuts,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    attended: Tensor = out  # without the auxiliary outputs, which were not asked for
    return attended


def _flash(version: int) -> Kernel:
    """FlashAttention's variable-length function, which serves grouped heads, windows and softcaps itself."""

    def kernel(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Segments,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> Tensor:
        if version == 3:
            from flash_attn_interface import flash_attn_varlen_func
        else:
            from flash_attn import flash_attn_varlen_func
        cuts, longest = segments.cu_seq_lens, segments.longest
        out: Tensor = flash_attn_varlen_func(
            query,
            key,
            value,
            cu_seqlens_q=cuts,
            cu_seqlens_k=cuts,
            max_seqlen_q=longest,
            max_seqlen_k=longest,
            softmax_scale=scaling,
            causal=True,
            softcap=softcap or 0.0,
            window_size=(-1, -1) if window is None else (window - 1, 0),
        )
        return out

    return kernel


def _segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    q, k, v = (tensor.transpose(0, 1) for tensor in (query, key, value))
    return segment_attention(q, k, v, segments, scaling=scaling, window=window, softcap=softcap).transpose(0, 1)


KERNELS: dict[str, Kernel] = {
    "flash_attention_3": _flash(3),
    "flash_attention_2": _flash(2),
    "varlen": _varlen,
    "sdpa": _segments,
}
"""By the names of the config, best first. Each maps (tokens, heads, dim) to (tokens, heads, value dim)."""

SHARES_PREFIXES = {"sdpa"}
"""Backends that attend to a shared prefix in its place. For the others it is repeated in each sequence, in attention only:
they need nothing of a kernel but causal attention over whole sequences."""

REGISTERED = {backend: f"rlhf_ray_{number}" for number, backend in enumerate(KERNELS)}
"""Names under which transformers knows the backends: its checks read more into names that contain "flash" or "sdpa"."""


def obstacle(backend: str, dtype: torch.dtype) -> str | None:
    """Why this machine cannot run ``backend`` in ``dtype``, or None where it can."""
    if backend == "sdpa":
        return None
    if not torch.cuda.is_available():
        return "there is no GPU"
    if dtype == torch.float32:
        return "it computes in half precision only and the model is fp32"
    if backend == "flash_attention_2" and not is_flash_attn_2_available():
        return "the package flash-attn is not installed"
    if backend == "flash_attention_3":
        if not is_flash_attn_3_available():
            return "the package flash-attn-3 is not installed"
        if torch.cuda.get_device_capability()[0] != 9:
            return "it runs on Hopper GPUs only"
    return None


def choose_backend(wanted: str, dtype: torch.dtype, *, strict: bool) -> tuple[str, str | None]:
    """Return the backend for ``wanted`` (a name or ``auto``) and, where it is another one, why.

    ``strict`` refuses to take another; otherwise the best that works is taken.
    """
    if wanted != "auto" and wanted not in KERNELS:
        raise ModelLoadError(f"unknown attention backend {wanted!r}: choose one of auto, {', '.join(KERNELS)}")
    reason = None if wanted == "auto" else obstacle(wanted, dtype)
    if wanted != "auto" and reason is None:
        return wanted, None
    if strict and reason is not None:
        raise ModelLoadError(f"attention backend {wanted} cannot be used here: {reason}. Set attention to auto")
    best = next(backend for backend in KERNELS if obstacle(backend, dtype) is None)
    return best, None if wanted == "auto" else f"{wanted} preferred, but {reason}"


def _check_call(module: nn.Module, dropout: float, is_causal: bool | None, given: dict[str, Any]) -> None:
    name = type(module).__name__
    unserved = {"s_aux": "attention sinks", "position_bias": "a position bias", "cache": "a paged cache"}
    for argument, what in unserved.items():
        if given.get(argument) is not None:
            raise ModelLoadError(f"{name} uses {what}, which packed attention does not serve: choose another model")
    if dropout:
        raise ModelLoadError(
            f"{name} has attention dropout {dropout}: load the model with this project, which turns "
            "dropout off, or set it to 0"
        )
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ModelLoadError(f"{name} is not causal: packed attention serves causal language models only")


def _segments_of(given: dict[str, Any]) -> Segments | None:
    """Return the segments of a call: shared by all layers, else described by the offsets, else none (padded)."""
    shared: Segments | None = given.get("packed_segments")
    cuts: Tensor | None = given.get("cu_seq_lens_q")
    return shared if shared is not None or cuts is None else Segments.of(cuts)


def _whole(kernel: Kernel) -> Kernel:
    """Make a kernel that gets every sequence whole, and gives each token's output where it first stands."""

    def whole(query: Tensor, key: Tensor, value: Tensor, segments: Segments, **given: Any) -> Tensor:
        if segments.parent is None:
            return kernel(query, key, value, segments, **given)
        sequences, tokens, first = segments.unshared
        repeated = (tensor.index_select(0, tokens) for tensor in (query, key, value))
        return kernel(*repeated, sequences, **given).index_select(0, first)

    return whole


def _interface(kernel: Kernel) -> Callable[..., tuple[Tensor, None]]:
    """Make the function that transformers calls for a kernel."""

    def attention(
        module: nn.Module,
        query: Float[Tensor, "batch heads query dim"],
        key: Float[Tensor, "batch key_heads key dim"],
        value: Float[Tensor, "batch key_heads key value_dim"],
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **given: Any,
    ) -> tuple[Float[Tensor, "batch query heads value_dim"], None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        segments = _segments_of(given)
        if segments is None:
            if softcap is not None:
                return _capped(query, key, value, attention_mask, scale, softcap).transpose(1, 2).contiguous(), None
            padded: Callable[..., tuple[Tensor, None]] = AttentionInterface()["sdpa"]
            return padded(module, query, key, value, attention_mask, dropout, scale, is_causal, **given)
        _check_call(module, dropout, is_causal, given)
        segments.attended += 1
        segments.windowed += sliding_window is not None
        tokens_first = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return kernel(*tokens_first, segments, scaling=scale, window=sliding_window, softcap=softcap)[None], None

    return attention


def _capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, softcap: float
) -> Float[Tensor, "batch heads query value_dim"]:
    """Padded attention with capped scores, which torch's kernel lacks."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = softcap * torch.tanh((q @ k.transpose(-1, -2)).float() * (scaling / softcap))
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[-2] - q.shape[-2])
    lowest = torch.finfo(scores.dtype).min  # not -inf: a row of padding sees nothing and must not become NaN
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1).to(v.dtype) @ v


for _backend, _kernel in KERNELS.items():
    _serving = _kernel if _backend in SHARES_PREFIXES else _whole(_kernel)
    AttentionInterface.register(REGISTERED[_backend], _interface(_serving))
    AttentionMaskInterface.register(REGISTERED[_backend], AttentionMaskInterface()["sdpa"])
