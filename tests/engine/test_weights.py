"""Whole weights come layer by layer, and get the names that they have on disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rlhf_ray.engine.weights import copied, disk_weights, gathered_groups, layer_name, layers
from rlhf_ray.models.actor import Actor
from rlhf_ray.models.disk_names import to_disk_names
from rlhf_ray.models.weights.lora import add_lora
from rlhf_ray.models.weights.tiny_llama import make_model


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
    assert layer_name(name) == layer


def test_layers_hold_every_parameter_once_in_the_order_of_the_module() -> None:
    model = make_model("llama-tiny", 32)
    grouped = layers(model)
    assert [name for layer in grouped for name, _ in layer] == [name for name, _ in model.named_parameters()]
    assert [len(layer) for layer in grouped] == [1, 9, 9, 1, 1]


def test_groups_are_the_weights_themselves_until_they_are_copied() -> None:
    module = nn.Linear(3, 2)
    groups = list(gathered_groups(module, receive=True))
    copies = list(map(copied, groups))
    module.weight.data.zero_()
    assert groups[0][0][1].abs().sum() == 0
    assert copies[0][0][1].abs().sum() > 0
    assert list(gathered_groups(module, receive=False)) == [[], []]


def named(groups: Iterable[list[tuple[str, Tensor]]]) -> dict[str, Tensor]:
    return {name: tensor for group in groups for name, tensor in group}


def test_weights_on_disk_are_those_of_the_model() -> None:
    model = make_model("llama-tiny", 32)
    expected, actual = model.state_dict(), named(disk_weights(model, receive=True))
    assert actual.keys() == expected.keys() and all(actual[name].equal(expected[name]) for name in expected)
    assert {tensor.dtype for tensor in actual.values()} == {torch.float32}
    assert not named(disk_weights(model, receive=False))


def test_weights_in_four_bits_come_dequantised(tmp_path: Path) -> None:
    make_model("llama-tiny", 32).save_pretrained(tmp_path)
    model = Actor(str(tmp_path), load_in_4bit=True, lora_rank=2).model
    actual, plain = named(disk_weights(model, receive=True)), make_model("llama-tiny", 32).state_dict()
    assert {name: tensor.shape for name, tensor in actual.items()} == {n: t.shape for n, t in plain.items()}
    assert all(actual[name].equal(tensor) for name, tensor in to_disk_names(model)) and len(actual) == len(plain)


def test_adapters_are_merged_on_the_device_of_the_weights() -> None:
    """On the device without memory, which stands for a GPU here: nothing may come to the CPU before it is merged."""
    model = make_model("llama-tiny", 32)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    add_lora(model, rank=2, alpha=4)
    try:
        merged = named(disk_weights(model.to("meta"), receive=True))
    except NotImplementedError as error:
        raise AssertionError(f"a weight left its device before it was merged: {error}") from error
    assert {name: tensor.shape for name, tensor in merged.items()} == shapes
    assert {tensor.device.type for tensor in merged.values()} == {"meta"}
