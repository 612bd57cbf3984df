"""LoRA beside a base that engines keep: only the adapter travels, and they compute what the trainer does."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.engine.weights import adapter_weights, disk_weights
from rlhf_ray.errors import RequestError
from rlhf_ray.models.weights.adapters import adapter_config
from rlhf_ray.models.weights.lora import add_lora
from rlhf_ray.rollout.errors import WeightUpdateError
from rlhf_ray.rollout.requests import Generation, make_requests
from rlhf_ray.rollout.vllm_engine import VllmEngine
from rlhf_ray.rollout.weights import vllm_adapter
from rlhf_ray.rollout.weights.vllm_cpu_lora import OneAdapter
from rlhf_ray.rollout.wire import PublishedWeights, publish, publish_adapter

from .llamas import EOS, VOCABULARY, largest_difference, make_llama, reference_log_probs

pytestmark = pytest.mark.vllm
DEADLINE_S, TOLERANCE, RANK = 60.0, 1e-4, 3
PROMPT = torch.randint(2, VOCABULARY, (70,), generator=torch.Generator().manual_seed(0)).tolist()
"""Two blocks of the prefix cache and some more."""
CONFIG = RolloutConfig(dtype="fp32", kv_cache_gib=0.1, max_model_tokens=256, lora="adapter")


@pytest.fixture(scope="module")
def policy() -> LlamaForCausalLM:
    """A tied Llama with adapters on parts of fused layers; ``step`` changes them."""
    model = make_llama(0, tied=True)
    add_lora(model, rank=RANK, alpha=8, targets=["q_proj", "v_proj", "o_proj", "up_proj"])
    return model


def step(model: LlamaForCausalLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def published(model: LlamaForCausalLM, version: int) -> PublishedWeights:
    base = (pair for group in disk_weights(model, receive=True, adapters="left out") for pair in group)
    tensors = (pair for group in adapter_weights(model, receive=True) for pair in group)
    adapter = publish_adapter(version, adapter_config(model), tensors, bucket_bytes=3000)
    return replace(publish(version, base), adapter=adapter)


def watched(weights: PublishedWeights, read: list[int]) -> PublishedWeights:
    """The same publication, which notes in ``read`` when its base is read."""

    def buckets() -> Iterator[Any]:
        read.append(weights.version)
        yield from weights.buckets

    return replace(weights, buckets=buckets())


@pytest.fixture(scope="module")
def engine(policy: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    directory = tmp_path_factory.mktemp("start")
    policy.config.save_pretrained(directory)
    shapes = {name: tuple(weight.shape) for name, weight in make_llama(0, tied=True).named_parameters()}
    started = VllmEngine(directory, CONFIG, stop_token_ids=(EOS,), shapes=shapes, adapter_rank=RANK)
    yield started
    started.shutdown()


def test_the_layers_of_an_engine_on_a_cpu_take_our_products(engine: VllmEngine) -> None:
    def classes(worker: Any) -> set[type]:
        layers = worker.get_model().modules()
        return {type(layer.punica_wrapper) for layer in layers if hasattr(layer, "punica_wrapper")}

    assert engine._engine.collective_rpc(classes) == [{OneAdapter}], "vLLM takes their class from elsewhere"


def left_behind() -> list[str]:
    return [name for name in os.listdir(vllm_adapter.MEMORY) if name.startswith(vllm_adapter.PREFIX)]


def test_after_the_first_version_the_adapter_alone_travels_and_log_probs_are_the_trainers(
    engine: VllmEngine, policy: LlamaForCausalLM
) -> None:
    requests = make_requests(
        [(0, PROMPT), *((n, PROMPT[: 9 + n]) for n in range(1, 5))], samples_per_prompt=1, max_new_tokens=8
    )
    read: list[int] = []
    for version in (1, 2, 3):
        step(policy, version)
        weights = published(policy, version)
        engine.receive(watched(weights, read))
        for _ in range(2):  # the second time from the prefix cache
            generations = engine.generate(requests, DEADLINE_S)
            assert largest_difference(policy, requests, generations, 1.0) < TOLERANCE
            assert {one for generation in generations for one in generation.weight_versions} == {version}
        assert weights.share_to_send < 0.2 and not left_behind()
        assert read == [1], "the base is read for the first version alone"
        step(policy, version + 10)
        assert largest_difference(policy, requests, generations, 1.0) > 0.01, "another adapter gives other log-probs"


def test_requests_in_work_go_on_with_the_new_adapter(engine: VllmEngine, policy: LlamaForCausalLM) -> None:
    step(policy, 1)
    engine.receive(published(policy, 5))
    request = make_requests([(0, PROMPT)], samples_per_prompt=1, max_new_tokens=30)[0]
    while True:  # it may end by itself: drawn until it has not
        engine.submit([request])
        for _ in range(5):
            engine.step()
        if engine.unfinished:
            break
    step(policy, 2)
    engine.receive(published(policy, 6))
    done: list[Generation] = []
    while engine.unfinished:
        done += engine.step()
    (ended,) = done
    split = ended.weight_versions.count(5)
    assert ended.weight_versions[split:] == (6,) * (len(ended.token_ids) - split) and 0 < split < len(ended.token_ids)
    for seed, part in ((1, slice(0, split)), (2, slice(split, None))):
        step(policy, seed)
        off = reference_log_probs(policy, request, ended, 1.0) - torch.tensor(ended.log_probs)
        assert off[part].abs().max() < TOLERANCE


def test_another_base_is_taken_whole_and_an_adapter_that_was_damaged_is_refused(
    engine: VllmEngine, policy: LlamaForCausalLM
) -> None:
    requests = make_requests([(0, PROMPT)], samples_per_prompt=1, max_new_tokens=8)
    with torch.no_grad():
        policy.model.embed_tokens.weight.mul_(-1)
    engine.receive(published(policy, 7))
    assert largest_difference(policy, requests, engine.generate(requests, DEADLINE_S), 1.0) < TOLERANCE
    weights = published(policy, 8)
    assert weights.adapter is not None
    lost = replace(weights.adapter.tensors, buckets=list(weights.adapter.tensors.buckets)[:-1])
    with pytest.raises(WeightUpdateError, match=r"the adapter that came has checksum \w+, sent was \w+"):
        engine.receive(replace(weights, adapter=replace(weights.adapter, tensors=lost)))


def test_an_adapter_goes_to_a_locked_directory_in_memory_and_what_a_dead_process_left_there_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vllm_adapter, "MEMORY", str(tmp_path))
    (left := tmp_path / f"{vllm_adapter.PREFIX}left").mkdir()
    with vllm_adapter._directory(10) as first, vllm_adapter._directory(10) as second:
        assert sorted(tmp_path.iterdir()) == sorted([first, second]) and not left.exists(), "one in use stays"
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_memory_has_no_room_for_goes_to_disk_or_is_an_error_with_the_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = {vllm_adapter.MEMORY: 10**6, str(tmp_path): 10**9}
    monkeypatch.setattr(vllm_adapter, "_free", free.__getitem__)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with vllm_adapter._directory(10**6) as directory:
        assert directory.parent == tmp_path
    message = r"of 2000 MB has no room in /dev/shm \(1 MB free\) .*rollout\.lora to merged"
    with pytest.raises(OSError, match=message), vllm_adapter._directory(2 * 10**9):
        pass


@pytest.mark.parametrize(
    ("content", "rank", "message"),
    [
        ({}, 513, "up to rank 512, and this one has 513"),
        ({"model_type": "mixtral", "num_local_experts": 4}, 8, "beside the experts of a mixture"),
        ({"model_type": "qwen2_vl", "text_config": {"model_type": "qwen2"}}, 8, "other parts than text"),
    ],
    ids=["rank", "experts", "images"],
)
def test_an_engine_refuses_adapters_that_vllm_would_get_wrong(
    content: dict[str, Any], rank: int, message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(RequestError, match=message):
        VllmEngine(tmp_path, CONFIG, stop_token_ids=(EOS,), shapes={}, adapter_rank=rank)


def test_room_is_made_for_the_least_rank_of_vllm_that_is_enough() -> None:
    from rlhf_ray.config.files.sampled import MOST_ADAPTER_RANK

    assert max(vllm_adapter.RANKS) == MOST_ADAPTER_RANK
    assert [vllm_adapter.adapter_arguments(rank)["max_lora_rank"] for rank in (1, 3, 8, 9, 512)] == [1, 8, 8, 16, 512]
