"""Weights reach the workers of an engine by being written once, whatever they are and however many workers read them."""

from __future__ import annotations

import gc
import os
import pickle
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_ray.rollout import vllm_workers
from rlhf_ray.rollout.vllm_engine import VllmEngine
from rlhf_ray.rollout.vllm_workers import SharedBucket, shared

Weights = list[tuple[str, Tensor]]


def weights_of_all_kinds() -> Weights:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(7, 33, generator=generator)
    return [
        ("half", numbers.bfloat16()),
        ("transposed", numbers.T),
        ("scalar", torch.tensor(2.5)),
        ("nothing", torch.empty(0, 4)),
        ("counts", torch.arange(5)),
        ("flag", torch.tensor([True, False, True])),
    ]


def same(one: Weights, other: Weights) -> bool:
    return [name for name, _ in one] == [name for name, _ in other] and all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        for (_, a), (_, b) in zip(one, other, strict=True)
    )


def digest(bucket: SharedBucket) -> list[Any]:
    """What another process finds in a bucket."""
    return [(name, str(weight.dtype), weight.tolist()) for name, weight in bucket.read()]


def test_another_process_reads_what_was_written() -> None:
    weights = weights_of_all_kinds()
    with shared(weights) as bucket, get_context("spawn").Pool(1) as pool:
        assert pool.apply(digest, (bucket,)) == [(name, str(weight.dtype), weight.tolist()) for name, weight in weights]


def test_what_was_read_stays_when_the_bucket_is_gone_and_is_nobody_elses() -> None:
    weights = weights_of_all_kinds()
    with shared(weights) as bucket:
        ours, theirs = bucket.read(), bucket.read()
    gc.collect()
    assert not Path(bucket.path).exists()
    assert same(ours, weights)
    ours[0][1].zero_()
    assert same(theirs, weights), "what one reader writes, no other sees"


def test_a_bucket_of_empty_weights_is_read_too() -> None:
    weights = [("nothing", torch.empty(0, 4, dtype=torch.bfloat16))]
    with shared(weights) as bucket:
        assert same(bucket.read(), weights)


def test_a_write_that_takes_a_part_goes_on_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call writes 2 GiB at most."""
    write = os.pwrite
    monkeypatch.setattr(vllm_workers.os, "pwrite", lambda file, data, offset: write(file, data[:100], offset))
    weights = weights_of_all_kinds()
    with shared(weights) as bucket:
        assert same(bucket.read(), weights)


def test_a_bucket_is_copied_once_and_only_its_description_goes_through_the_queue_of_the_workers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written: list[int] = []
    sent: list[int] = []
    write = os.pwrite
    monkeypatch.setattr(
        vllm_workers.os, "pwrite", lambda file, data, offset: written.append(len(data)) or write(file, data, offset)
    )
    engine = VllmEngine.__new__(VllmEngine)
    engine._workers = SimpleNamespace(processes=["worker"] * 4)  # type: ignore[assignment]

    def collective_rpc(method: str, kwargs: dict[str, Any]) -> None:
        sent.append(len(pickle.dumps(kwargs)))
        bucket = kwargs["update_info"]["weights"]
        assert not isinstance(bucket, SharedBucket) or all(same(bucket.read(), weights) for _ in range(4))

    engine._engine = SimpleNamespace(collective_rpc=collective_rpc)  # type: ignore[assignment]
    weights = [(f"layer.{number}", torch.full((1024, 256), float(number))) for number in range(16)]
    engine._load(weights)
    size = sum(weight.nbytes for _, weight in weights)
    assert len(sent) == 1 and sent[0] < 4096, f"{sent} bytes go to every worker"
    assert sum(written) == size == 2**24
