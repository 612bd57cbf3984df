"""Attention backends for packs: which exist, which one suits a device, and how transformers calls them.

Invariants:

- Segments travel in the keyword arguments ``cu_seq_lens_q/k`` and ``max_length_q/k``, which transformers hands to every
  registered attention function. Nothing is kept on a config.
- A kernel sees shared prefixes only if it supports them; otherwise it gets every sequence whole.
- If a model needs what a backend lacks (attention sinks, position biases, dropout), it is refused with the name of that.
- Calls without segments are ordinary padded attention.
- Kernels come from installed packages, never from a hub.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from inspect import signature
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

GROUPED = "enable_gqa"
"""Argument of torch's variable-length attention that lets heads share a key."""
VARLEN_NEEDS = ("scale", "window_size")
"""Arguments of it without which it cannot compute what a model asks for; torch 2.10 lacks them."""


def _varlen(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, *, scaling: float, window: int | None, softcap: None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    if softcap is not None:
        raise ModelLoadError("attention backend varlen cannot cap attention scores (softcap): set attention to sdpa")
    cuts, longest = segments.cu_seq_lens, segments.longest
    # torch 2.11 lacks the argument, and takes fewer key heads without it.
    grouped: dict[str, Any] = {}
    if query.shape[1] != key.shape[1] and GROUPED in signature(varlen_attn).parameters:
        grouped[GROUPED] = True
    out: Any = varlen_attn(
        query,
        key,
        value,
        cuts,
        cuts,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),  # the window of a model counts the token itself
        **grouped,
    )
    attended: Tensor = out  # not a tuple, since no auxiliary outputs are requested
    return attended


def _flash(version: int) -> Kernel:
    """Wrap FlashAttention's variable-length function, which supports grouped heads, windows and softcaps itself."""

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
"""Kernels by their names in configs, fastest first. Each maps queries (tokens, heads, dim), and keys and values with fewer
heads or as many, to (tokens, heads, value dim)."""

SHARES_PREFIXES = {"sdpa"}
"""Backends that attend to a shared prefix where it lies. For the others attention alone repeats it in each sequence, so that
a kernel needs only causal attention over whole sequences."""

REGISTERED = {backend: f"rlhf_ray_{number}" for number, backend in enumerate(KERNELS)}
"""Names under which the backends are registered in transformers, which treats names with "flash" or "sdpa" specially."""


def obstacle(backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Return why ``backend`` cannot run in ``dtype`` on ``device``, or None if it can."""
    if backend == "sdpa":
        return None
    if device.type != "cuda":
        return f"it runs on GPUs only, not on the {device.type.upper()}"
    if dtype == torch.float32:
        return "it computes in half precision only and the model is fp32"
    if backend == "varlen":
        return _varlen_obstacle()
    if backend == "flash_attention_2" and not is_flash_attn_2_available():
        return "the package flash-attn is not installed"
    if backend == "flash_attention_3":
        if not is_flash_attn_3_available():
            return "the package flash-attn-3 is not installed"
        if torch.cuda.get_device_capability(device)[0] != 9:
            return "it runs on Hopper GPUs only"
    return None


def _varlen_obstacle() -> str | None:
    if find_spec("torch.nn.attention.varlen") is None:
        return f"torch {torch.__version__} has no attention over sequences of different lengths"
    from torch.nn.attention.varlen import varlen_attn

    lacking = [argument for argument in VARLEN_NEEDS if argument not in signature(varlen_attn).parameters]
    return f"torch.nn.attention.varlen of torch {torch.__version__} lacks {', '.join(lacking)}" if lacking else None


def choose_backend(preferred: str, dtype: torch.dtype, device: torch.device, *, strict: bool) -> tuple[str, str | None]:
    """Return the backend to use on ``device`` for ``preferred`` (a name or ``auto``) and, if it is another one, why.

    With ``strict``, a backend that cannot run there is an error; otherwise the fastest that can run takes its place.
    """
    if preferred != "auto" and preferred not in KERNELS:
        raise ModelLoadError(f"unknown attention backend {preferred!r}: choose one of auto, {', '.join(KERNELS)}")
    works = [backend for backend in KERNELS if obstacle(backend, dtype, device) is None]
    reason = None if preferred == "auto" else obstacle(preferred, dtype, device)
    if preferred != "auto" and reason is None:
        return preferred, None
    if strict and reason is not None:
        raise ModelLoadError(
            f"attention backend {preferred} cannot be used here: {reason}. Set attention to auto, or to one that can: "
            f"{', '.join(works)}"
        )
    return works[0], None if preferred == "auto" else f"{preferred} preferred, but {reason}"


def _check_call(module: nn.Module, dropout: float, is_causal: bool | None, options: dict[str, Any]) -> None:
    name = type(module).__name__
    unsupported = {"s_aux": "attention sinks", "position_bias": "a position bias", "cache": "a paged cache"}
    for argument, what in unsupported.items():
        if options.get(argument) is not None:
            raise ModelLoadError(f"{name} uses {what}, which packed attention does not support: choose another model")
    if dropout:
        raise ModelLoadError(
            f"{name} has attention dropout {dropout}: load the model with this project, which turns "
            "dropout off, or set it to 0"
        )
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ModelLoadError(f"{name} is not causal: packed attention supports causal language models only")


def _find_segments(options: dict[str, Any]) -> Segments | None:
    """Return the segments that all layers share, or those that the offsets describe, or None for a padded batch."""
    shared: Segments | None = options.get("packed_segments")
    cuts: Tensor | None = options.get("cu_seq_lens_q")
    return shared if shared is not None or cuts is None else Segments.of(cuts)


def _with_whole_sequences(kernel: Kernel) -> Kernel:
    """Wrap a kernel so that it gets every sequence whole; a shared token's output is taken from its first sequence."""

    def attend(query: Tensor, key: Tensor, value: Tensor, segments: Segments, **options: Any) -> Tensor:
        if segments.parent is None:
            return kernel(query, key, value, segments, **options)
        sequences, tokens, first = segments.unshared
        repeated = (tensor.index_select(0, tokens) for tensor in (query, key, value))
        return kernel(*repeated, sequences, **options).index_select(0, first)

    return attend


def _make_interface(kernel: Kernel) -> Callable[..., tuple[Tensor, None]]:
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
        **options: Any,
    ) -> tuple[Float[Tensor, "batch query heads value_dim"], None]:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        segments = _find_segments(options)
        if segments is None:
            if softcap is not None:
                return _capped(query, key, value, attention_mask, scale, softcap).transpose(1, 2).contiguous(), None
            padded: Callable[..., tuple[Tensor, None]] = AttentionInterface()["sdpa"]
            return padded(module, query, key, value, attention_mask, dropout, scale, is_causal, **options)
        _check_call(module, dropout, is_causal, options)
        segments.attended += 1
        segments.windowed += sliding_window is not None
        tokens_first = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        attended = kernel(*tokens_first, segments, scaling=scale, window=sliding_window, softcap=softcap)
        return attended[None].contiguous(), None  # some models view it in another shape

    return attention


def _capped(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, softcap: float
) -> Float[Tensor, "batch heads query value_dim"]:
    """Attend in a padded batch with bounded scores, which torch's kernel does not support."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scores = softcap * torch.tanh((q @ k.transpose(-1, -2)).float() * (scaling / softcap))
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril(k.shape[-2] - q.shape[-2])
    lowest = torch.finfo(scores.dtype).min  # not -inf: a row of padding sees nothing and must not become NaN
    scores = scores.masked_fill(~mask, lowest) if mask.dtype == torch.bool else scores + mask
    return torch.softmax(scores, -1).to(v.dtype) @ v


for _backend, _kernel in KERNELS.items():
    _complete = _kernel if _backend in SHARES_PREFIXES else _with_whole_sequences(_kernel)
    AttentionInterface.register(REGISTERED[_backend], _make_interface(_complete))
    AttentionMaskInterface.register(REGISTERED[_backend], AttentionMaskInterface()["sdpa"])
