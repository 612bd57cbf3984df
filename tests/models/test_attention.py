"""A token attends to its own segment up to itself and to what that continues, within the window, and to nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.models.forward import attention
from rlhf_ray.models.forward.attention import segment_attention
from rlhf_ray.models.forward.segments import Segments
from rlhf_ray.trajectories.packing import list_ancestors

HEADS, KEY_HEADS, DIM = 4, 2, 8


def reference(
    q: Tensor, k: Tensor, v: Tensor, segments: Segments, scaling: float, window: int | None, softcap: float | None
) -> Tensor:
    """One query at a time, in double precision."""
    q, k, v = q.double(), k.double().repeat_interleave(2, 0), v.double().repeat_interleave(2, 0)
    cuts = segments.cu_seq_lens.tolist()
    rows = []
    for line in list_ancestors(segments.parent or [-1] * len(segments.lengths)):
        tokens = [token for segment in line for token in range(cuts[segment], cuts[segment + 1])]
        for t in range(cuts[line[-1]], cuts[line[-1] + 1]):
            seen = tokens[: tokens.index(t) + 1][-window if window else 0 :]
            scores = (k[:, seen] @ q[:, t, :, None])[..., 0] * scaling
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            rows.append((scores.softmax(-1)[:, :, None] * v[:, seen]).sum(1))
    return torch.stack(rows, 1)


def inputs(tokens: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, tokens, DIM), (KEY_HEADS, tokens, DIM), (KEY_HEADS, tokens, DIM))
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes]


def segments_of(lengths: list[int], parent: list[int] | None = None) -> Segments:
    return Segments.of(torch.tensor([0, *lengths]).cumsum(0), None if parent is None else torch.tensor(parent))


@st.composite
def forests(draw: st.DrawFn) -> Segments:
    """Segments of which some continue earlier ones: none, pairs, samples of a prompt, trees."""
    lengths = draw(st.lists(st.integers(1, 40), min_size=1, max_size=9))
    if draw(st.booleans()):
        return segments_of(lengths)
    return segments_of(lengths, [draw(st.integers(-1, segment - 1)) for segment in range(len(lengths))])


def gradients(out: Tensor, of: list[Tensor]) -> tuple[Tensor, ...]:
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    return torch.autograd.grad((out.to(torch.promote_types(out.dtype, torch.float32)) * weights).sum(), of)


@settings(deadline=None, max_examples=40)
@given(segments=forests(), window=st.none() | st.integers(1, 45), softcap=st.none() | st.just(2.0))
def test_equals_one_query_at_a_time(segments: Segments, window: int | None, softcap: float | None) -> None:
    q, k, v = inputs(sum(segments.lengths))
    out = segment_attention(q, k, v, segments, scaling=0.5, window=window, softcap=softcap)
    expected = reference(q, k, v, segments, 0.5, window, softcap)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
    for mine, theirs in zip(gradients(out, [q, k, v]), gradients(expected, [q, k, v]), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@settings(deadline=None, max_examples=20)
@given(segments=forests(), window=st.none() | st.integers(1, 45), tile=st.integers(100, 2000))
def test_explicit_products_equal_one_query_at_a_time(segments: Segments, window: int | None, tile: int) -> None:
    """In fp32, so that a wrong formula cannot hide in rounding: with tiles of every shape."""
    q, k, v = inputs(sum(segments.lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "LOW_PRECISION", (torch.float32,))
        patch.setattr(attention, "SCORES_AT_ONCE", tile)
        patch.setattr(attention, "QUERIES_AT_ONCE", 1 + tile % 17)
        out = segment_attention(q, k, v, segments, scaling=0.5, window=window)
    expected = reference(q, k, v, segments, 0.5, window, None)
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
    for mine, theirs in zip(gradients(out, [q, k, v]), gradients(expected, [q, k, v]), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("explicit_up_to", [0, 16, 512])
@pytest.mark.parametrize("parent", [None, [-1, 0, 0, -1, -1, 4, 4, -1]])
def test_half_precision_agrees_on_every_path(
    monkeypatch: pytest.MonkeyPatch, window: int | None, explicit_up_to: int, parent: list[int] | None
) -> None:
    monkeypatch.setattr(attention, "LONGEST_KEPT", explicit_up_to)
    monkeypatch.setattr(attention, "LONGEST_EXPLICIT", explicit_up_to)
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 1500)
    segments = segments_of([30, 12, 11, 3, 30, 1, 29, 26], parent)
    q, k, v = inputs(sum(segments.lengths), torch.bfloat16)
    out = segment_attention(q, k, v, segments, scaling=0.35, window=window)
    expected = reference(q, k, v, segments, 0.35, window, None)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), expected, atol=2e-2, rtol=2e-2)
    with torch.no_grad():
        assert torch.equal(segment_attention(q, k, v, segments, scaling=0.35, window=window), out), "kept or not"
    for a, b in zip(gradients(out, [q, k, v]), gradients(expected, [q, k, v]), strict=True):
        assert float((a.double() - b.double()).norm() / b.double().norm()) < 1e-2


@settings(deadline=None, max_examples=40)
@given(
    segments=forests(),
    places=st.lists(st.integers(0, 359), min_size=1, max_size=9),
    window=st.none() | st.integers(1, 45),
    softcap=st.none() | st.just(2.0),
)
def test_tokens_that_are_read_get_what_they_would_and_others_nothing(
    segments: Segments, places: list[int], window: int | None, softcap: float | None
) -> None:
    """Any tokens, several of a segment or none, in any order, with gradients."""
    tokens = sum(segments.lengths)
    q, k, v = inputs(tokens)
    segments.read = tuple(dict.fromkeys(place % tokens for place in places))
    out = segment_attention(q, k, v, segments, scaling=0.5, window=window, softcap=softcap)
    expected = torch.zeros_like(out, dtype=torch.float64)
    read = list(segments.read)
    expected[:, read] = reference(q, k, v, segments, 0.5, window, softcap)[:, read]
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)
    for mine, theirs in zip(gradients(out, [q, k, v]), gradients(expected, [q, k, v]), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


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
    assert len(segments_of([9, 10]).groups) == 1
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(b.grad[:, :9], a.grad, atol=1e-6, rtol=1e-6)
        assert not b.grad[:, 9:].any()


@settings(deadline=None, max_examples=50)
@given(lengths=st.lists(st.integers(1, 300), min_size=1, max_size=40), shared=st.integers(0, 3))
def test_groups_hold_every_token_once_and_waste_little(lengths: list[int], shared: int) -> None:
    parent = [-1 if segment < shared + 1 else segment % (shared + 1) - 1 for segment in range(len(lengths))]
    segments = segments_of(lengths, parent)
    rows = torch.cat([group.queries for group in segments.groups])
    real = [torch.ones(len(g.queries), 1) if g.real is None else g.real for g in segments.groups]
    kept = rows[torch.cat(real)[:, 0].bool()]
    assert sorted(kept.tolist()) == list(range(sum(lengths)))
    assert torch.equal(rows[segments.query_rows], torch.arange(sum(lengths)))
    keys = torch.cat([group.keys for group in segments.groups])
    assert torch.equal(keys[segments.key_rows], torch.arange(sum(lengths)))
    for group in segments.groups:
        assert len({run.context_length for run in group.runs}) == 1
        assert group.real is None or float(group.real.mean()) > 0.5 or group.longest <= 8
