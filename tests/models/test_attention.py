"""A token attends to its own segment up to itself, within the window, and to nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.models import attention
from rlhf_ray.models.attention import Segments, segment_attention

HEADS, KEY_HEADS, DIM = 4, 2, 8


def reference(
    q: Tensor, k: Tensor, v: Tensor, lengths: list[int], scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """One query at a time, in double precision."""
    q, k, v = q.double(), k.double().repeat_interleave(2, 0), v.double().repeat_interleave(2, 0)
    rows = []
    start = 0
    for length in lengths:
        for t in range(start, start + length):
            first = start if window is None else max(start, t - window + 1)
            scores = (k[:, first : t + 1] @ q[:, t, :, None])[..., 0] * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            rows.append((scores.softmax(-1)[:, :, None] * v[:, first : t + 1]).sum(1))
        start += length
    return torch.stack(rows, 1)


def inputs(tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, tokens, DIM), (KEY_HEADS, tokens, DIM), (KEY_HEADS, tokens, DIM))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def segments_of(lengths: list[int]) -> Segments:
    return Segments.of(torch.tensor([0, *lengths]).cumsum(0))


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=9),
    window=st.none() | st.integers(1, 45),
    softcap=st.none() | st.just(2.0),
)
def test_equals_one_query_at_a_time(lengths: list[int], window: int | None, softcap: float | None) -> None:
    q, k, v = inputs(sum(lengths))
    out = segment_attention(q, k, v, segments_of(lengths), scaling=0.5, window=window, softcap=softcap)
    expected = reference(q, k, v, lengths, 0.5, window, softcap)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(
        torch.autograd.grad((out * weights).sum(), (q, k, v)),
        torch.autograd.grad((expected * weights).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("explicit_up_to", [0, 16, 512])
def test_half_precision_agrees_on_every_path(
    monkeypatch: pytest.MonkeyPatch, window: int | None, explicit_up_to: int
) -> None:
    monkeypatch.setattr(attention, "LONGEST_EXPLICIT", explicit_up_to)
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 1500)
    lengths = [30, 12, 11, 3, 30, 1, 29, 26]
    q, k, v = inputs(sum(lengths), torch.bfloat16)
    out = segment_attention(q, k, v, segments_of(lengths), scaling=0.35, window=window)
    expected = reference(q, k, v, lengths, 0.35, window, None)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad((out.float() * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((expected * weights).sum(), (q, k, v))
    for a, b in zip(mine, theirs, strict=True):
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 1e-2


def test_other_segments_and_later_tokens_have_no_influence() -> None:
    """Although similar lengths share a batch: other segments may not even be numbers."""
    lengths = [9, 10, 10, 4]  # the second segment is 9..18
    q, k, v = (tensor.detach() for tensor in inputs(sum(lengths)))
    clean = segment_attention(q, k, v, segments_of(lengths), scaling=1.0)
    for tensor in (q, k, v):
        tensor[:, :9] = tensor[:, 19:] = float("nan")
        tensor[:, 15:19] += 7
    changed = segment_attention(q, k, v, segments_of(lengths), scaling=1.0)
    assert torch.equal(changed[:, 9:15], clean[:, 9:15])
    assert not torch.equal(changed[:, 15:19], clean[:, 15:19])


def test_padding_inside_a_batch_has_no_gradient() -> None:
    """The last token of a shorter segment stands in its padded rows: its gradient must count once."""
    alone, together = inputs(9), inputs(9 + 10)
    for a, b in zip(alone, together, strict=True):
        b.data[:, :9] = a.data
    segment_attention(*alone, segments_of([9]), scaling=1.0).sum().backward()
    segment_attention(*together, segments_of([9, 10]), scaling=1.0)[:, :9].sum().backward()
    assert len(segments_of([9, 10]).batches()) == 1
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(b.grad[:, :9], a.grad, atol=1e-6, rtol=1e-6)
        assert not b.grad[:, 9:].any()


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=40).filter(any))
def test_groups_hold_every_token_once_and_waste_little(lengths: list[int]) -> None:
    segments = segments_of(lengths)
    rows = torch.cat([group.rows for group in segments.batches()])
    real = [torch.ones(len(g.rows), 1) if g.real is None else g.real for g in segments.batches()]
    kept = rows[torch.cat(real)[:, 0].bool()]
    assert sorted(kept.tolist()) == list(range(sum(lengths)))
    assert torch.equal(rows[segments.row_of_token], torch.arange(sum(lengths)))
    for group in segments.batches():
        assert group.real is None or float(group.real.mean()) > 0.5 or group.longest <= 8
