"""Kernels that torch has on a GPU only, registered on the CPU in plain arithmetic, so that what calls them runs in tests.

They check what the real ones demand of their arguments, and round where those round. They say nothing about speed.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from torch import Tensor

HALF_PRECISION = (torch.bfloat16, torch.float16)


@contextmanager
def half_precision_products() -> Iterator[None]:
    """Register ``torch.mm`` and ``torch.addmm`` with ``out_dtype``, which multiply in half precision and sum in fp32."""
    library = torch.library.Library("aten", "IMPL")

    def mm(left: Tensor, right: Tensor, out_dtype: torch.dtype) -> Tensor:
        assert left.dtype == right.dtype and left.dtype in HALF_PRECISION and out_dtype == torch.float32
        return left.float() @ right.float()

    def addmm(
        total: Tensor,
        left: Tensor,
        right: Tensor,
        out_dtype: torch.dtype,
        *,
        out: Tensor,
        beta: float = 1,
        alpha: float = 1,
    ) -> Tensor:
        assert out.dtype == out_dtype and total.dtype in (out_dtype, left.dtype)
        return out.copy_(beta * total + alpha * mm(left, right, out_dtype))

    library.impl("mm.dtype", mm, "CPU")
    library.impl("addmm.dtype_out", addmm, "CPU")
    yield
    del library


@contextmanager
def flash_attention() -> Iterator[Counter[str]]:
    """Register torch's FlashAttention, on which ``torch.nn.attention.varlen`` stands; yields how often it was called."""
    library, calls = torch.library.Library("aten", "IMPL"), Counter[str]()

    def forward(
        query: Tensor, key: Tensor, value: Tensor, cuts: Tensor, key_cuts: Tensor, longest: int, longest_key: int,
        dropout: float, is_causal: bool, return_debug_mask: bool, *, scale: float | None = None,
        window_size_left: int | None = None, window_size_right: int | None = None, **unused: None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        calls["forward"] += 1
        assert dropout == 0 and not return_debug_mask and not any(unused.values())
        _check(query, key, value, cuts, longest, key_cuts, longest_key)
        window = -1 if window_size_left is None else window_size_left
        assert is_causal or window_size_right == 0
        out, lse = torch.empty_like(query), query.new_empty(query.shape[1], len(query), dtype=torch.float32)
        for part in _parts(cuts):
            scores, rows = _scores(query[part], key[part], scale, window), value[part]
            lse[:, part] = scores.logsumexp(-1)
            out[part] = (scores.softmax(-1) @ _heads_first(rows, query)).transpose(0, 1).to(query.dtype)
        nothing = torch.empty(0)
        return out, lse, nothing, nothing, nothing

    def backward(
        above: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, cuts: Tensor, key_cuts: Tensor,
        longest: int, longest_key: int, dropout: float, is_causal: bool, rng_state: Tensor, unused: Tensor, *,
        scale: float | None = None, window_size_left: int | None = None, window_size_right: int | None = None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        calls["backward"] += 1
        _check(query, key, value, cuts, longest, key_cuts, longest_key)
        window, factor = -1 if window_size_left is None else window_size_left, scale or query.shape[-1] ** -0.5
        gradients = tuple(torch.empty_like(tensor) for tensor in (query, key, value))
        for part in _parts(cuts):
            p = (_scores(query[part], key[part], scale, window) - lse[:, part, None]).exp()
            g, o = (_heads_first(tensor[part], query) for tensor in (above, out))
            for_scores = p * (g @ _heads_first(value[part], query).mT - (g * o).sum(-1, keepdim=True)) * factor
            for_q = for_scores @ _heads_first(key[part], query)
            for_k, for_v = for_scores.mT @ _heads_first(query[part], query), p.mT @ g
            for total, own in zip(gradients, (for_q, for_k, for_v), strict=True):
                own = own.unflatten(0, (total.shape[1], -1)).sum(1)  # heads that share a key
                total[part] = own.transpose(0, 1).to(total.dtype)
        return gradients

    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    yield calls
    del library


def install_flash_attn(patch: pytest.MonkeyPatch, version: int) -> None:
    """Put a module with the published signature of flash-attn 2 or 3 in the place of the package, which is not installed here.

    It shows that our arguments mean what we want. Whether the package computes that, only a GPU can show.
    """

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
        softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
        softcap: float = 0.0,
    ) -> Tensor:  # fmt: skip
        _check(q, k, v, cu_seqlens_q, max_seqlen_q, cu_seqlens_k, max_seqlen_k)
        assert causal
        out = []
        for part in _parts(cu_seqlens_q):
            scores = _scores(q[part], k[part], softmax_scale, window_size[0], softcap)
            out.append((scores.softmax(-1) @ _heads_first(v[part], q)).transpose(0, 1).to(q.dtype))
        return torch.cat(out)

    name = "flash_attn" if version == 2 else "flash_attn_interface"
    module = ModuleType(name)
    vars(module)["flash_attn_varlen_func"] = flash_attn_varlen_func
    patch.setitem(sys.modules, name, module)


def _check(
    query: Tensor, key: Tensor, value: Tensor, cuts: Tensor, longest: int, key_cuts: Tensor, longest_key: int
) -> None:
    """What the kernels refuse, and what they would read out of bounds for."""
    assert {query.dtype, key.dtype, value.dtype} <= set(HALF_PRECISION) and query.dtype == key.dtype == value.dtype
    assert all(tensor.stride(-1) == 1 and tensor.shape[-1] % 8 == 0 for tensor in (query, key, value))
    assert query.shape[1] % key.shape[1] == 0 and key.shape[:2] == value.shape[:2] and len(query) == len(key)
    for some, most in ((cuts, longest), (key_cuts, longest_key)):
        assert some.dtype == torch.int32 and some.is_contiguous() and some[0] == 0 and some[-1] == len(query)
        assert int(some.diff().max()) <= most


def _parts(cuts: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in pairwise(cuts.tolist())]


def _heads_first(rows: Tensor, query: Tensor) -> Tensor:
    """Return (heads, tokens, dim) in fp32, with every key for all heads that share it."""
    return rows.transpose(0, 1).float().repeat_interleave(query.shape[1] // rows.shape[1], 0)


def _scores(query: Tensor, key: Tensor, scale: float | None, window: int, softcap: float = 0.0) -> Tensor:
    """Scaled scores (heads, queries, keys) of causal attention; a query sees ``window`` keys before its own, or all (-1)."""
    scores = _heads_first(query, query) @ _heads_first(key, query).mT * (scale or query.shape[-1] ** -0.5)
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if window >= 0:
        seen = seen.triu(-window)
    return scores.masked_fill(~seen, float("-inf"))
