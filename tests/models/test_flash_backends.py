"""The backends that compute on a GPU only, with plain arithmetic in the place of their kernels: what we ask of them is
attention within segments, as transformers computes it for each sequence alone. The kernels have not run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen
from transformers import PreTrainedModel

from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.forward import attention_backends as backends
from rlhf_ray.models.forward.packed import packed_forward
from rlhf_ray.models.weights.load import check_packing, prepare_for_packs
from rlhf_ray.trajectories.packing import Packed
from tests.models.gpu_kernels import flash_attention, install_flash_attn
from tests.models.test_shared_prefix import batch_of, both

Make = Callable[..., PreTrainedModel]
HALF_AS_GOOD = 2.0
SHAPE = [(0, [7]), (6, [5, 1, 9]), (0, [1]), (12, [3, 20])]
"""Segments shorter and longer than the window of 5, and prefixes that three sequences and two share."""


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """A machine on which every backend can run, with what they call; yields the calls of torch's kernel."""
    monkeypatch.setattr(backends, "obstacle", lambda *_: None)
    for version in (2, 3):
        install_flash_attn(monkeypatch, version)
    with flash_attention() as calls:
        yield calls


def results(model: PreTrainedModel, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states, and the embedding's gradient of a function of them, in fp64."""
    model.zero_grad()
    direction = torch.linspace(-1, 1, hidden.shape[-1], dtype=torch.float64)
    (hidden.double().tanh() * direction).sum().backward()
    return hidden.detach().double(), model.get_input_embeddings().weight.grad.double()


def packed_results(causal: Make, family: str, attention: str, packs: Packed) -> tuple[Tensor, Tensor]:
    model = causal(family).base_model.to(torch.float16)
    assert prepare_for_packs(model, attention, strict=True) == (attention, None)
    return results(model, packs.per_sequence(packed_forward(model, packs)))


def alone(causal: Make, family: str, packs: Packed) -> tuple[Tensor, Tensor]:
    """Each sequence by itself, with transformers' own attention in fp32."""
    model = causal(family).base_model
    cuts = packs.offsets.tolist()
    runs = (packs.token_ids[None, start:end] for start, end in pairwise(cuts))
    return results(model, torch.cat([model(input_ids=ids, use_cache=False).last_hidden_state[0] for ids in runs]))


def off(ours: Tensor, exact: Tensor) -> float:
    return float((ours - exact).norm() / exact.norm())


@pytest.mark.parametrize("attention", ["varlen", "flash_attention_2", "flash_attention_3"])
def test_a_pack_is_its_sequences_alone(family: str, causal: Make, attention: str, on_a_gpu: dict[str, int]) -> None:
    """Outputs and gradients are as near to exact as those of sdpa, in the same precision, with heads that share keys, windows
    and shared prefixes; the shared ones are computed once for all but attention.
    """
    shared, repeated = both(batch_of(SHAPE))
    if family == "gemma2" and attention == "varlen":
        with pytest.raises(
            ModelLoadError, match=r"varlen cannot cap attention scores \(softcap\): set attention to sdpa"
        ):
            packed_results(causal, family, attention, shared)
        return
    exact = alone(causal, family, repeated)
    assert shared.num_tokens < repeated.num_tokens
    for packs in (shared, repeated):
        ours = packed_results(causal, family, attention, packs)
        limits = packed_results(causal, family, "sdpa", packs)
        for a, b, limit in zip(ours, exact, limits, strict=True):
            assert off(a, b) <= HALF_AS_GOOD * off(limit, b)
    if attention == "varlen":
        layers = causal(family).config.num_hidden_layers
        assert on_a_gpu == {"forward": 2 * layers, "backward": 2 * layers}


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("attention", ["varlen", "flash_attention_2", "flash_attention_3"])
def test_the_proof_at_loading_runs_on_every_backend(causal: Make, attention: str) -> None:
    model = causal("qwen3").base_model.to(torch.bfloat16)
    prepare_for_packs(model, attention, strict=True)
    check_packing(model, model)


def varlen_of_torch_2_11(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int, *,
    return_aux: object = None, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), **unknown: object,
) -> Tensor:  # fmt: skip
    """The signature of torch 2.11, whose kernel takes fewer key heads without being told."""
    assert not unknown, f"torch 2.11 knows no {unknown}"
    grouped = query.shape[1] != key.shape[1]
    return VARLEN(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale=scale, window_size=window_size, enable_gqa=grouped
    )


VARLEN = varlen.varlen_attn


@pytest.mark.usefixtures("on_a_gpu")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_varlen_of_torch_2_11_gets_no_argument_that_it_lacks(
    monkeypatch: pytest.MonkeyPatch, causal: Make, family: str
) -> None:
    shared, _ = both(batch_of(SHAPE))
    expected = packed_results(causal, family, "varlen", shared)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_of_torch_2_11)
    for a, b in zip(packed_results(causal, family, "varlen", shared), expected, strict=True):
        assert torch.equal(a, b)


def varlen_of_torch_2_10(query: Tensor, is_causal: bool = False, scale: float | None = None) -> None:
    """What matters of its signature: no windows, by which alone attention is causal since 2.11."""


def test_varlen_runs_where_it_takes_what_we_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda")
    assert {"scale", "window_size", "enable_gqa"} <= signature(varlen.varlen_attn).parameters.keys()
    assert backends.obstacle("varlen", torch.bfloat16, gpu) is None
    monkeypatch.setattr(varlen, "varlen_attn", varlen_of_torch_2_11)
    assert backends.obstacle("varlen", torch.bfloat16, gpu) is None
    monkeypatch.setattr(varlen, "varlen_attn", varlen_of_torch_2_10)
    reason = backends.obstacle("varlen", torch.bfloat16, gpu)
    assert reason == f"torch.nn.attention.varlen of torch {torch.__version__} lacks window_size"
