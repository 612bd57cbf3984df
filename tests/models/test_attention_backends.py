"""Which attention backend a machine gets, and what calls outside of packs do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, PreTrainedModel

from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.forward import attention_backends as backends
from rlhf_ray.models.forward.attention_backends import KERNELS, REGISTERED, choose_backend
from rlhf_ray.models.forward.segments import Segments
from rlhf_ray.models.weights.load import check_packing, prepare_for_packs
from rlhf_ray.trajectories.packing import Packed

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
ON_CPU = "it runs on GPUs only, not on the CPU"


@pytest.mark.parametrize("torch_sees_a_gpu", [False, True])
def test_on_the_cpu_it_is_sdpa_whatever_else_the_machine_has(
    monkeypatch: pytest.MonkeyPatch, torch_sees_a_gpu: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: torch_sees_a_gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    assert choose_backend("auto", torch.bfloat16, CPU, strict=True) == ("sdpa", None)
    assert choose_backend("sdpa", torch.float32, CPU, strict=True) == ("sdpa", None)
    for name in ("flash_attention_3", "flash_attention_2", "varlen"):
        assert choose_backend(name, torch.bfloat16, CPU, strict=False) == ("sdpa", f"{name} preferred, but {ON_CPU}")
        with pytest.raises(ModelLoadError, match=f"{name} cannot be used here: {ON_CPU}. Set .* one that can: sdpa"):
            choose_backend(name, torch.bfloat16, CPU, strict=True)


@pytest.mark.parametrize(
    ("installed", "major", "dtype", "expected"),
    [
        ((), 9, torch.bfloat16, "varlen"),
        ((2,), 8, torch.bfloat16, "flash_attention_2"),
        ((2, 3), 9, torch.float16, "flash_attention_3"),
        ((2, 3), 10, torch.bfloat16, "flash_attention_2"),
        ((2, 3), 9, torch.float32, "sdpa"),
    ],
)
def test_a_gpu_gets_the_best_that_is_installed(
    monkeypatch: pytest.MonkeyPatch, installed: tuple[int, ...], major: int, dtype: torch.dtype, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
    for version in (2, 3):
        monkeypatch.setattr(backends, f"is_flash_attn_{version}_available", lambda v=version: v in installed)
    assert choose_backend("auto", dtype, GPU, strict=True) == (expected, None)


def test_a_backend_that_the_gpu_lacks_is_refused_with_those_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(backends, "is_flash_attn_2_available", lambda: False)
    monkeypatch.setattr(backends, "is_flash_attn_3_available", lambda: True)
    with pytest.raises(ModelLoadError, match=r"3 cannot be used here: it runs on Hopper .* one that can: varlen, sdpa"):
        choose_backend("flash_attention_3", torch.bfloat16, GPU, strict=True)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ModelLoadError, match="'eager': choose one of auto, flash_attention_3"):
        choose_backend("eager", torch.float32, CPU, strict=False)


def call(module: nn.Module, segments: Segments | None, **options: object) -> Tensor:
    q = torch.randn(1, 2, 4, 8)
    attend = backends.AttentionInterface()[REGISTERED["sdpa"]]
    arguments = {} if segments is None else segments.arguments()
    return attend(module, q, q, q, None, **arguments, **options)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"s_aux": torch.zeros(2)}, "Identity uses attention sinks"),
        ({"position_bias": torch.zeros(2)}, "Identity uses a position bias"),
        ({"dropout": 0.1}, "Identity has attention dropout 0.1"),
        ({"is_causal": False}, "Identity is not causal"),
    ],
)
def test_what_packs_do_not_serve_is_refused_by_name(options: dict[str, object], message: str) -> None:
    segments = Segments.of(torch.tensor([0, 1, 4]))
    assert call(nn.Identity(), segments).shape == (1, 4, 2, 8)
    with pytest.raises(ModelLoadError, match=message):
        call(nn.Identity(), segments, **options)


def test_offsets_alone_are_enough(causal: Callable[..., PreTrainedModel], packed: Packed) -> None:
    """What transformers documents for packed input: no object of ours."""
    model = causal().base_model
    prepare_for_packs(model, "sdpa", strict=True)
    segments = Segments.of(packed.offsets)
    outputs = [
        model(
            input_ids=packed.token_ids[None], position_ids=packed.position_ids[None], attention_mask=mask, **arguments
        )
        for mask in (None, torch.empty(1, 1, 0, 0, dtype=torch.bool))
        for arguments in (
            segments.arguments(),
            {k: v for k, v in segments.arguments().items() if k != "packed_segments"},
        )
    ]
    assert all(torch.equal(outputs[0].last_hidden_state, output.last_hidden_state) for output in outputs)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_calls_equal_transformers_eager_attention(
    family: str, causal: Callable[..., PreTrainedModel], sequences: list[Tensor],
    pad: Callable[..., tuple[Tensor, Tensor]], side: str,
) -> None:  # fmt: skip
    theirs, mine = causal(family).base_model, causal(family).base_model
    prepare_for_packs(mine, "sdpa", strict=True)
    ids, mask = pad(sequences, side)
    expected, actual = (model(input_ids=ids, attention_mask=mask).last_hidden_state for model in (theirs, mine))
    torch.testing.assert_close(actual[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-5)


def test_generation_uses_the_cache(family: str, causal: Callable[..., PreTrainedModel]) -> None:
    theirs, mine = causal(family), causal(family)
    prepare_for_packs(mine, "sdpa", strict=True)
    ids = torch.arange(3, 10)[None]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    assert torch.equal(mine.generate(ids, **settings), theirs.generate(ids, **settings))


def test_every_backend_is_registered() -> None:
    assert set(REGISTERED) == set(KERNELS) == {"flash_attention_3", "flash_attention_2", "varlen", "sdpa"}
    for name in REGISTERED.values():
        assert name in backends.AttentionInterface() and name in backends.AttentionMaskInterface()


def test_a_model_that_mixes_segments_is_refused(causal: Callable[..., PreTrainedModel]) -> None:
    """The proof at loading does not trust descriptions: this model shifts tokens outside of its attention."""
    model = causal().base_model
    prepare_for_packs(model, "sdpa", strict=True)
    check_packing(model, model)
    norm = model.layers[0].input_layernorm
    norm.register_forward_hook(lambda _, inputs, output: output + output.roll(1, 1).index_fill(1, torch.tensor([0]), 0))
    with pytest.raises(ModelLoadError, match="LlamaModel gives other outputs packed than alone"):
        check_packing(model, model)


def test_the_model_is_left_as_it_was_by_the_proof() -> None:
    from transformers import LlamaConfig

    model = AutoModel.from_config(LlamaConfig(vocab_size=9, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                                              intermediate_size=16)).train()  # fmt: skip
    prepare_for_packs(model, "sdpa", strict=True)
    check_packing(model, model)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
