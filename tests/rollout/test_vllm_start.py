"""An engine that gets its weights by an update reads none, samples nothing before, and is then as if it had read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.errors import RequestError
from rlhf_ray.rollout.requests import make_requests
from rlhf_ray.rollout.transformers_engine import TransformersEngine
from rlhf_ray.rollout.vllm_engine import VllmEngine
from rlhf_ray.rollout.wire import publish, shapes_on_disk

from .llamas import EOS, make_llama, weights_of

pytestmark = pytest.mark.vllm


def start(directory: Path, **settings: Any) -> VllmEngine:
    config = RolloutConfig(dtype="fp32", kv_cache_gib=0.1, max_model_tokens=128)
    return VllmEngine(directory, config, stop_token_ids=(EOS,), seed=5, deterministic=True, **settings)


def tensors_of(engine: VllmEngine) -> dict[str, Tensor]:
    """Copies of all parameters and buffers of vLLM's model, which on CPU lies in this process."""
    core: Any = engine._engine.engine_core
    model = core.engine_core.model_executor.driver_worker.worker.model_runner.model
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return {name: tensor.detach().clone() for name, tensor in named}


def test_what_an_update_overwrites_is_not_read_and_nothing_else_is_left_as_it_was_made(tmp_path: Path) -> None:
    model = make_llama(3, tied=True)
    unreadable = make_llama(3, tied=True)
    for parameter in unreadable.parameters():
        parameter.data.fill_(float("nan"))
    for name, written in (("read", model), ("unread", unreadable)):
        saved: LlamaForCausalLM = written
        saved.save_pretrained(tmp_path / name)
    reads = start(tmp_path / "read")
    expected, answers = tensors_of(reads), reads.generate(seeded(), 60.0)
    reads.shutdown()

    engine = start(tmp_path / "unread", shapes=shapes_on_disk(tmp_path / "read"))
    try:
        before = tensors_of(engine)
        assert not any(tensor.isnan().any() for tensor in before.values() if tensor.is_floating_point()), "it was read"
        with pytest.raises(RequestError, match="was started without weights: update them before the first request"):
            engine.generate(seeded(), 60.0)
        engine.receive(publish(0, weights_of(model)))
        after = tensors_of(engine)
        assert after.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(after[name], expected[name])] == []
        assert engine.generate(seeded(), 60.0) == answers, "what is packed has no name, but samples"
    finally:
        engine.shutdown()


def test_an_engine_of_transformers_starts_without_weights_too(tmp_path: Path) -> None:
    model = make_llama(3, tied=True)
    model.save_pretrained(tmp_path / "whole")
    model.config.save_pretrained(tmp_path / "config alone")
    config, settings = RolloutConfig(backend="transformers", dtype="fp32"), {"stop_token_ids": (EOS,), "seed": 5}
    expected = TransformersEngine(tmp_path / "whole", config, **settings).generate(seeded(), 60.0)
    engine = TransformersEngine(
        tmp_path / "config alone", config, shapes=shapes_on_disk(tmp_path / "whole"), **settings
    )
    with pytest.raises(RequestError, match="was started without weights: update them before the first request"):
        engine.generate(seeded(), 60.0)
    engine.receive(publish(0, weights_of(model)))
    assert engine.generate(seeded(), 60.0) == expected


def seeded() -> list[Any]:
    return make_requests([(0, [3, 4, 5]), (1, [7, 8])], samples_per_prompt=2, max_new_tokens=6, run_seed=1)
