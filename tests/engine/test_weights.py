"""Groups of a layer and checksums of weights as they travel."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rlhf_ray.engine import Checksum, DiskWeights, checksum
from rlhf_ray.engine.weights import gathered_groups, layer_of, layers
from rlhf_ray.models.make import make_model


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.10.mlp.experts.3.w1.weight", "model.layers.10"),
        ("transformer.h.0.ln_1.bias", "transformer.h.0"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("score.weight", "score.weight"),
    ],
)
def test_a_layer_is_named_up_to_its_number(name: str, layer: str) -> None:
    assert layer_of(name) == layer


def test_layers_hold_every_parameter_once_in_the_order_of_the_module() -> None:
    model = make_model("llama-tiny", 32)
    grouped = layers(model)
    assert [name for layer in grouped for name, _ in layer] == [name for name, _ in model.named_parameters()]
    assert [len(layer) for layer in grouped] == [1, 9, 9, 1, 1]


def test_groups_are_copies() -> None:
    module = nn.Linear(3, 2)
    groups = list(gathered_groups(module, receive=True))
    module.weight.data.zero_()
    assert groups[0][0][1].abs().sum() > 0
    assert list(gathered_groups(module, receive=False)) == [[], []]


def test_weights_on_disk_are_those_of_the_model_in_the_wire_dtype() -> None:
    model = make_model("llama-tiny", 32)
    source = DiskWeights(model, torch.bfloat16, receive=True)
    expected = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    found = dict(source)
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in expected)
    assert [(name, t.dtype, tuple(t.shape)) for name, t in source] == source.metadata()


def stream() -> list[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (f"w{i}", torch.randn(3, 4, generator=generator).to(d)) for i, d in enumerate((torch.float32, torch.bfloat16))
    ]


def test_a_checksum_is_the_same_for_torch_and_numpy_and_for_any_strides() -> None:
    total = Checksum()
    for name, tensor in stream():
        flipped = tensor.t().contiguous().t()  # the same numbers, laid out by columns
        total.add(name, flipped if tensor.dtype == torch.bfloat16 else tensor.numpy())
    assert total.value == checksum(stream())
    read_only = np.arange(4.0)
    read_only.flags.writeable = False
    assert Checksum().value == 0
    Checksum().add("r", read_only)


def test_a_checksum_changes_with_every_part_of_the_stream() -> None:
    (a, first), (b, second) = stream()
    flipped = first.clone()
    flipped.view(torch.int32)[2, 3] ^= 1
    changed = [
        [(a, flipped), (b, second)], [(b, second), (a, first)], [("other", first), (b, second)], [(a, first)],
        [(a, first.reshape(4, 3)), (b, second)], [(a, first.view(torch.int32)), (b, second)],
        [(a, first), (b, second), ("empty", torch.empty(0))],
    ]  # fmt: skip
    sums = [checksum(stream()), *map(checksum, changed)]
    assert len(set(sums)) == len(sums)
