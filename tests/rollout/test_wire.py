"""The checksum sees what changed and not how it was cut; an update is whole and as announced, or refused."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf_ray.errors import RequestError
from rlhf_ray.rollout.errors import WireError
from rlhf_ray.rollout.wire import (
    DIGEST_WORDS,
    Checksum,
    IncomingUpdate,
    digest,
    publish,
    shapes_on_disk,
    to_array,
    to_tensor,
)

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
Weights = list[tuple[str, torch.Tensor]]


def make_weights(seed: int = 0) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 4), "b": (5,), "c": (), "d": (2, 3, 2), "e": (1, 7)}
    return [
        (name, torch.randn(shape, generator=generator).to(DTYPES[index % 4]))
        for index, (name, shape) in enumerate(shapes.items())
    ]


def checksum(weights: Any) -> str:
    total = Checksum()
    for name, weight in weights:
        total.add(name, weight)
    return total.hexdigest()


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int64, torch.bool])
def test_a_weight_arrives_with_its_dtype_and_bits(dtype: torch.dtype) -> None:
    weight = torch.randn(3, 4).to(dtype).t()
    array = pickle.loads(pickle.dumps(to_array(weight)))
    array.flags.writeable = False
    assert to_tensor(array).dtype == dtype
    assert torch.equal(to_tensor(array), weight)


@given(st.integers(1, 400))
def test_the_cut_into_buckets_changes_nothing(bucket_bytes: int) -> None:
    weights = make_weights()
    published = publish(3, iter(weights), bucket_bytes=bucket_bytes)
    assert published.checksum == checksum(weights) == publish(3, weights).checksum
    arrived = [(name, to_tensor(array)) for bucket in published.buckets for name, array in bucket]
    assert [name for name, _ in arrived] == [name for name, _ in weights]
    assert all(torch.equal(there, here) for (_, there), (_, here) in zip(arrived, weights, strict=True))
    full = [sum(array.nbytes for _, array in bucket) for bucket in published.buckets[:-1]]
    assert all(size >= bucket_bytes for size in full)


@pytest.mark.parametrize("index", range(5))
def test_the_checksum_sees_one_bit_one_name_one_dtype_one_shape(index: int) -> None:
    weights = make_weights()
    name, weight = weights[index]
    flipped = weight.clone()
    flipped.view(-1)[-1:].view(torch.uint8)[0] ^= 1
    other_dtype = to_array(weight).view(f"i{weight.element_size()}")  # the same bytes in the same shape
    changes = [(name, flipped), (name + "x", weight), (name, weight[None]), (name, other_dtype)]
    sums = {checksum([*weights[:index], change, *weights[index + 1 :]]) for change in changes}
    assert len(sums | {checksum(weights)}) == 5
    assert checksum(weights[::-1]) != checksum(weights)


@pytest.mark.parametrize("words", [3, DIGEST_WORDS, 3 * DIGEST_WORDS + 5])
def test_a_digest_sees_every_bit_of_a_word_and_every_exchange_of_words(words: int) -> None:
    weight = torch.randn(2 * words)
    before = digest(weight).item()
    for bit in range(64):
        changed = weight.clone()
        changed.view(torch.int64)[words // 2] ^= 1 << bit if bit < 63 else -(2**63)
        assert digest(changed).item() != before, f"bit {bit}"
    for first, second in ((0, 1), (0, words - 1), (words // 2, words - 1)):
        changed = weight.clone()
        changed.view(torch.int64)[[first, second]] = weight.view(torch.int64)[[second, first]]
        assert digest(changed).item() != before, f"words {first} and {second}"


def test_a_digest_is_of_the_bytes_and_not_of_where_they_lie() -> None:
    packed = torch.arange(5000, dtype=torch.uint8)
    assert digest(packed[2:4002]).item() == digest(packed[2:4002].clone()).item()
    assert digest(packed[:7]).item() != digest(packed[:6]).item()


def test_a_whole_update_is_accepted_as_tensors() -> None:
    weights = make_weights()
    published = publish(1, weights, bucket_bytes=20)
    update = IncomingUpdate({name: tuple(weight.shape) for name, weight in weights})
    arrived = [pair for bucket in published.buckets for pair in update.accept(bucket)]
    update.close(published.checksum)
    assert all(torch.equal(there, here) for (_, there), (_, here) in zip(arrived, weights, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: [*weights, ("lm_head.weight", torch.zeros(2))], "'lm_head.weight' is not the name"),
        (lambda weights: weights + weights[:1], "'a' came twice"),
        (lambda weights: [("a", weights[0][1].t()), *weights[1:]], r"'a' has shape \(4, 3\)"),
        (lambda weights: [("a", weights[0][1].long()), *weights[1:]], "have checksum"),
        (lambda weights: weights[:-1], "1 weights did not come, the first is 'e'"),
        (lambda weights: [("a", weights[0][1] + 1), *weights[1:]], "checksum"),
        (lambda weights: [weights[1], weights[0], *weights[2:]], "checksum"),
    ],
)
def test_a_broken_update_is_refused(change: Callable[[Weights], Weights], message: str) -> None:
    weights = make_weights()
    update = IncomingUpdate({name: tuple(weight.shape) for name, weight in weights})
    with pytest.raises(WireError, match=message):
        update.accept(change(weights))
        update.close(checksum(weights))


def test_names_on_disk_are_those_of_the_files(save_llama: Any, tmp_path: Path) -> None:
    for tied in (True, False):
        model, directory = save_llama(0, tied=tied)
        on_disk = shapes_on_disk(directory)
        assert on_disk == {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        assert ("lm_head.weight" in on_disk) is not tied
    with pytest.raises(RequestError, match=r"holds no \*.safetensors"):
        shapes_on_disk(tmp_path)
