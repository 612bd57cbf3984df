"""A publication moves each byte of the weights once, into where the engines read it, and reads it once for the checksum."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_ray.actors.workers.policy import LanguageSetup, PolicyWorker
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.errors import RequestError
from rlhf_ray.models.weights import lora
from rlhf_ray.rollout import wire
from rlhf_ray.rollout.wire import Bucket, IncomingUpdate, publish

COPYING = {torch.ops.aten._to_copy, torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten.cat}
SMALL = 8 * wire.DIGEST_WORDS
"""Bytes of a copy that belongs to a digest and not to a weight."""


class Copies(TorchDispatchMode):
    """Counts the bytes that torch copies, but for small tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in COPYING and result.nbytes > SMALL:
            self.nbytes += result.nbytes
        return result


def start(zero: int, rank: int | None) -> PolicyWorker:
    torch.set_num_threads(1)
    make = {"shape": "llama-0.5m", "tokenizer_from": "world"}
    model: dict[str, Any] = {"make": make, "dtype": "fp32"}
    if rank is not None:
        model["lora"] = {"rank": rank}
    engine = {"zero": zero, "optimizer": {"learning_rate": 0.02}}
    worker = PolicyWorker()
    worker.setup(LanguageSetup(RoleConfig.model_validate({"model": model, "engine": engine}), seed=0, total_updates=1))
    return worker


def large(named: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in named.values() if tensor.nbytes > SMALL)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The bytes of each tensor that is read for a checksum."""
    nbytes: list[int] = []
    original = wire.digest

    def counted(tensor: Tensor) -> Tensor:
        nbytes.append(tensor.nbytes)
        return original(tensor)

    monkeypatch.setattr(wire, "digest", counted)
    yield nbytes


@pytest.mark.parametrize(("zero", "rank"), [(0, None), (0, 2), (3, None), (3, 2)])
def test_each_byte_is_copied_once_and_read_once(
    zero: int, rank: int | None, read: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = start(zero, rank)
    weights = dict(worker.disk_weights())
    merged = {name: weights[f"{name}.weight"] for name in lora.adapted_layers(worker.hf_model)}
    assert bool(merged) is (rank is not None)
    with Copies() as gathering:
        for _ in worker.engine.disk_weights_in_place(worker.hf_model):
            pass
    kept: list[Bucket] = []
    monkeypatch.setattr(worker, "keep_bucket", kept.append)
    with Copies() as publishing:
        published = worker.publish_weights(1)
    assert published is not None
    assert publishing.nbytes == gathering.nbytes, "a weight is copied between the model and its bucket"
    if zero == 0:
        assert publishing.nbytes == large(merged), "only what is merged is written anew, and that once"
    arrived = [pair for bucket in kept for pair in bucket]
    assert [name for name, _ in arrived] == list(weights)
    assert all(np.array_equal(array, weights[name].numpy()) for name, array in arrived)
    assert sum(read) == sum(tensor.nbytes for tensor in weights.values()), "the sender reads each byte once"
    read.clear()
    update = IncomingUpdate({name: tuple(tensor.shape) for name, tensor in weights.items()})
    with Copies() as receiving:
        for bucket in kept:
            update.accept(bucket)
        update.close(published.checksum)
    assert receiving.nbytes == 0 and sum(read) == sum(tensor.nbytes for tensor in weights.values())


@pytest.mark.parametrize("zero", [0, 3])
def test_an_adapter_travels_apart_from_a_base_that_is_gathered_once(zero: int, read: list[int]) -> None:
    """What is merged by hand from base and adapter is what would have been published merged."""
    worker = start(zero, 2)
    for version in (1, 2):
        for name, parameter in worker.hf_model.named_parameters():
            if lora.is_adapter_part(name):
                parameter.data.normal_(std=version)
        read.clear()
        published = worker.publish_weights(version, "adapter")
        assert published is not None and published.adapter is not None and published.version == version
        tensors, scaling = published.adapter.read(), published.adapter.config["lora_alpha"] / 2
        sent = sum(tensor.nbytes for tensor in tensors.values())
        assert len([weight for bucket in published.adapter.tensors.buckets for weight in bucket]) == 1, (
            "all end to end in one"
        )
        assert sent == published.adapter.tensors.nbytes == published.share_to_send * published.nbytes
        assert sum(read) == 2 * sent + (published.nbytes if version == 1 else 0), (
            "the base is read for the first version alone"
        )
        base = {name: wire.to_tensor(array) for bucket in published.buckets for name, array in bucket}
        whole = dict(worker.disk_weights())
        assert list(base) == list(whole)
        for name, weight in base.items():
            path = f"base_model.model.{name.removesuffix('.weight')}"
            if f"{path}.lora_A.weight" in tensors:
                weight = weight + scaling * tensors[f"{path}.lora_B.weight"] @ tensors[f"{path}.lora_A.weight"]
            torch.testing.assert_close(weight, whole[name])
        assert 2 * len(lora.adapted_layers(worker.hf_model)) == len(tensors)
    assert worker.adapter_rank() == 2 and worker.execution().quantization is None


def test_a_policy_that_trains_more_than_lora_publishes_no_adapter() -> None:
    with pytest.raises(RequestError, match=r"trains all its weights.*rollout\.lora to merged \(it trains model\."):
        start(0, None).adapter_rank()


def test_a_bucket_on_the_cpu_holds_the_memory_of_the_model() -> None:
    worker = start(0, None)
    held = {name: parameter.data_ptr() for name, parameter in worker.hf_model.named_parameters()}
    published = worker.publish_weights(1)
    assert published is not None
    assert {name: array.ctypes.data for bucket in published.buckets for name, array in bucket} == held


def test_a_bucket_is_kept_as_soon_as_it_is_full() -> None:
    """Of a sharded model no more than a bucket and a layer are whole at once."""
    events: list[str] = []

    def weights() -> Iterator[tuple[str, Tensor]]:
        for name in "abcd":
            events.append(name)
            yield name, torch.zeros(4)

    publish(1, weights(), keep=lambda bucket: events.append(f"kept {len(bucket)}"), bucket_bytes=32)
    assert events == ["a", "b", "kept 2", "c", "d", "kept 2"]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_merged_in_fp32_where_the_weight_lies_and_never_whole(
    dtype: torch.dtype, transposed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lora, "MERGED_AT_ONCE", 1000)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(240, 400, generator=generator).to(dtype)
    down, up = torch.randn(3, 240 if transposed else 400), torch.randn(400 if transposed else 240, 3)
    layer = SimpleNamespace(scaling={lora.ADAPTER: 0.5}, fan_in_fan_out=transposed)
    model = SimpleNamespace(get_submodule=lambda name: layer)
    parts = {"x.base_layer.weight": weight, "x.lora_A.default.weight": down, "x.lora_B.default.weight": up}
    change = 0.5 * (up.double() @ down.double())
    expected = weight.double() + (change.T if transposed else change)
    with Copies() as copies:
        merged = lora.merged(model, parts)["x.weight"]  # type: ignore[arg-type]  # only its get_submodule is asked for
    assert merged.dtype == dtype and merged.is_contiguous()
    torch.testing.assert_close(merged.double(), expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
    assert weight.nbytes > SMALL
    assert copies.nbytes == 0, "a whole matrix was copied"
    on_meta = lora.merged(model, {name: part.to("meta") for name, part in parts.items()})  # type: ignore[arg-type]
    assert on_meta["x.weight"].device.type == "meta", "merged where the weight lies"
