"""What is split is what was joined, bit for bit, and a checksum covers names and shapes."""

from __future__ import annotations

import itertools
from dataclasses import replace

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from rlhf_ray.rollout.errors import WireError
from rlhf_ray.rollout.weights.flat import joined, split
from rlhf_ray.rollout.wire import publish_adapter, to_tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = st.lists(st.integers(0, 5), max_size=3)


@hypothesis.given(st.lists(st.tuples(st.sampled_from(DTYPES), SHAPES, st.booleans())), st.integers(1, 200))
def test_what_is_split_is_what_was_joined(
    described: list[tuple[torch.dtype, list[int], bool]], flat_bytes: int
) -> None:
    weights: list[tuple[str, Tensor]] = []
    for number, (dtype, shape, turned) in enumerate(described):
        tensor = torch.randn(shape).to(dtype)
        weights.append((f'layer "{number}"', tensor.transpose(0, -1) if turned and shape else tensor))
    before = [tensor.clone() for _, tensor in weights]
    flats = list(joined(weights, flat_bytes))
    for _, tensor in weights:
        tensor.fill_(7)
    parts = [part for contents, flat in flats for part in split(contents, flat)]
    assert [name for name, _ in parts] == [name for name, _ in weights]
    for (_, part), expected in zip(parts, before, strict=True):
        assert part.dtype == expected.dtype and part.shape == expected.shape
        assert torch.equal(part, expected), "a copy that does not change with the model"
    for (_, flat), (_, following) in itertools.pairwise(flats):
        assert flat.dtype != following.dtype or flat.nbytes >= flat_bytes, "as few as the limit allows"


def test_a_large_adapter_is_cut_into_several_buckets_and_a_small_one_is_a_single_tensor() -> None:
    tensors = {f"layers.{number}.lora_A.weight": torch.randn(8, 32) for number in range(10)}
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    small = publish_adapter(1, {}, tensors.items())
    (((_, only),),) = small.tensors.buckets
    assert only.nbytes == nbytes == small.tensors.nbytes
    large = publish_adapter(1, {}, tensors.items(), bucket_bytes=4096)
    assert [sum(array.nbytes for _, array in bucket) for bucket in large.tensors.buckets] == [4096, 4096, 2048]
    for adapter in (small, large):
        found = adapter.read()
        assert list(found) == list(tensors) and all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("was", ["lora_A", "[8, 4]"], ids=["name", "shape"])
def test_names_and_shapes_are_under_the_checksum(was: str) -> None:
    adapter = publish_adapter(1, {}, [("layer.lora_A.weight", torch.randn(8, 4))])
    (((contents, array),),) = adapter.tensors.buckets
    assert was in contents
    other = contents.replace(was, {"lora_A": "lora_B", "[8, 4]": "[4, 8]"}[was])
    assert isinstance(array, np.ndarray) and len(list(split(other, to_tensor(array)))) == 1
    damaged = replace(adapter, tensors=replace(adapter.tensors, buckets=(((other, array),),)))
    with pytest.raises(WireError, match="the adapter that came has checksum"):
        damaged.read()
