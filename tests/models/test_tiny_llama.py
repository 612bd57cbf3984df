"""The same shape, sizes and seed give the same weights, whatever the state of the global random generator."""

from __future__ import annotations

import pytest
import torch

from rlhf_ray.config.sections.models import MADE_SHAPES
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.weights.tiny_llama import make_config, make_model

VLLM_CPU_HEAD_SIZES = {32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512}


def weights(seed: int) -> list[torch.Tensor]:
    return list(make_model("llama-tiny", 50, seed=seed, eos_token_id=1).state_dict().values())


def test_a_seed_decides_the_weights() -> None:
    first = weights(3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        second = weights(3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(a.dtype == torch.float32 and torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not all(torch.equal(a, b) for a, b in zip(first, weights(4), strict=True))


@pytest.mark.parametrize(
    ("shape", "vocabulary", "millions"),
    [("llama-0.5m", 300, 0.57), ("llama-14m", 4096, 13.8), ("llama-120m", 4096, 119.6)],
)
def test_shapes_are_as_large_as_their_names_say(shape: str, vocabulary: int, millions: float) -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(shape, vocabulary))
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e6 == pytest.approx(millions, rel=0.01)


def test_special_tokens_and_vocabulary_stand_in_the_config() -> None:
    config = make_model("llama-tiny", 50, pad_token_id=0, eos_token_id=1).config
    assert (config.vocab_size, config.pad_token_id, config.bos_token_id, config.eos_token_id) == (50, 0, None, 1)


def test_vllm_serves_every_shape_on_cpu() -> None:
    assert {shape.head_dim for shape in MADE_SHAPES.values()} <= VLLM_CPU_HEAD_SIZES


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ModelLoadError, match=r"'llama-9t'.*llama-tiny"):
        make_model("llama-9t", 50)
