"""What an engine tells vLLM, without one that runs: its executor, its batches, whether its weights fit, and when it sleeps."""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from transformers import LlamaForCausalLM
from vllm import EngineArgs
from vllm.config import ParallelConfig
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.llm_engine import LLMEngine
from vllm.v1.executor import Executor
from vllm.v1.executor.abstract import SLEEP_TAGS
from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

from rlhf_ray.config.sections.engine import ResourcesConfig
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.errors import CapacityError, RequestError
from rlhf_ray.planning.colocation.phases import Level
from rlhf_ray.rollout import vllm_engine
from rlhf_ray.rollout.engine import RolloutEngine
from rlhf_ray.rollout.requests import make_requests
from rlhf_ray.rollout.vllm_engine import CACHE, WEIGHTS, VllmEngine, require_room
from rlhf_ray.rollout.vllm_workers import WorkerProcesses
from rlhf_ray.rollout.wire import publish

from .llamas import weights_of

pytestmark = pytest.mark.vllm
SaveLlama = Callable[..., tuple[LlamaForCausalLM, Path]]


class Started(Exception):
    """Instead of an engine."""


@pytest.fixture
def told(save_llama: SaveLlama, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[EngineArgs, UsageContext]]:
    """What vLLM is told by an engine with these keys."""
    import vllm

    _, directory = save_llama(0)
    heard: list[Any] = []

    def from_engine_args(*arguments: Any) -> Any:
        heard.extend(arguments)
        raise Started

    monkeypatch.setattr(vllm, "LLMEngine", type("LLMEngine", (), {"from_engine_args": staticmethod(from_engine_args)}))

    def start(**keys: Any) -> tuple[EngineArgs, UsageContext]:
        heard.clear()
        with pytest.raises(Started):
            VllmEngine(directory, RolloutConfig(dtype="fp32", max_model_tokens=128, **keys), stop_token_ids=(1,))
        return heard[0], heard[1] if len(heard) > 1 else UsageContext.ENGINE_CONTEXT

    return start


class Placement:
    """What ``get_current_placement_group`` gives in an actor that was placed with two GPUs."""

    bundle_specs = ({"CPU": 1.0, "GPU": 2.0},)


@pytest.mark.parametrize("parallel", [1, 2])
def test_an_engine_in_a_placement_group_keeps_its_workers_to_itself(
    parallel: int, told: Callable[..., tuple[EngineArgs, UsageContext]], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, _ = told(tensor_parallel=parallel)
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr("ray.util.get_current_placement_group", Placement)
    left_to_vllm = ParallelConfig(tensor_parallel_size=2)
    assert left_to_vllm.distributed_executor_backend == "ray", (
        "vLLM chooses otherwise now: see whether mp must be named"
    )
    config = SimpleNamespace(
        parallel_config=ParallelConfig(
            tensor_parallel_size=parallel, distributed_executor_backend=arguments.distributed_executor_backend
        )
    )
    assert arguments.tensor_parallel_size == parallel
    assert Executor.get_class(config).__name__ == {1: "UniProcExecutor", 2: "MultiprocExecutor"}[parallel]


@pytest.mark.parametrize("parallel", [1, 2])
def test_batches_have_the_sizes_of_vllms_offline_class_or_of_the_config(
    parallel: int, told: Callable[..., tuple[EngineArgs, UsageContext]]
) -> None:
    tokens, sequences = EngineArgs.get_batch_defaults(parallel)
    assert sequences[UsageContext.LLM_CLASS] == 256 * parallel, "of the CPU: docs/configuration.md says it"
    assert tokens[UsageContext.LLM_CLASS] == 4096 * parallel
    arguments, context = told(tensor_parallel=parallel)
    config = arguments.create_engine_config(context).scheduler_config
    assert config.max_num_seqs == sequences[UsageContext.LLM_CLASS]
    assert config.max_num_batched_tokens == tokens[UsageContext.LLM_CLASS]
    arguments, context = told(tensor_parallel=parallel, max_num_seqs=7, max_num_batched_tokens=300)
    config = arguments.create_engine_config(context).scheduler_config
    assert (config.max_num_seqs, config.max_num_batched_tokens) == (7, 300)


GIB = 2**30


@pytest.mark.parametrize(
    ("keys", "least"),
    [
        ({"dtype": "bf16"}, {"weights": 2, "KV cache": 2**20 / GIB}),
        ({"dtype": "fp32"}, {"weights": 4, "KV cache": 2**21 / GIB}),
        ({"dtype": "bf16", "tensor_parallel": 2}, {"weights": 1, "KV cache": 2**19 / GIB}),
        ({"dtype": "bf16", "max_model_tokens": 2**19}, {"weights": 2, "KV cache": 1}),
    ],
)
def test_a_share_of_a_gpu_that_cannot_hold_the_weights_and_an_answer_is_refused_with_the_numbers(
    keys: dict[str, Any], least: dict[str, float], tmp_path: Path
) -> None:
    """A GiB of numbers, and 2 KiB of cache for a token in bf16: 2 layers of 2 key heads of 128, keys and values."""
    widths = {"num_hidden_layers": 2, "hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps({**widths, "intermediate_size": 1024, "vocab_size": 1000}))
    config = RolloutConfig(**{"max_model_tokens": 512, "gpu_memory_utilization": 0.5, **keys})
    needed = sum(least.values()) * GIB
    shapes = {"model.layers.0.weight": (1024, 2**20)}
    with pytest.raises(CapacityError) as caught:
        require_room(tmp_path, shapes, config, int(2 * needed))
    said = str(caught.value)
    assert f"rollout.gpu_memory_utilization is 0.5, which is {needed / GIB:.2f} GiB of a GPU of" in said
    for part, gib in least.items():
        assert f"{part} {gib:.2f}" in said
    for key in ("rollout.dtype", "rollout.max_model_tokens", "rollout.tensor_parallel"):
        assert f"{key} {getattr(config, key.partition('.')[2])}" in said
    rest = config.max_model_tokens * (3 * 1024 + 4 * 512) * 4 + 3 * 1000 * 4
    require_room(tmp_path, shapes, config, int(2 * (needed + rest)) + 1)


def test_an_engine_on_a_gpu_is_refused_before_vllm_starts(
    told: Callable[..., tuple[EngineArgs, UsageContext]], save_llama: SaveLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, directory = save_llama(0)
    monkeypatch.setattr(
        vllm_engine, "prepare_process", lambda device: None
    )  # it would choose a GPU for all later tests
    monkeypatch.setattr(vllm_engine, "_gpu_bytes", lambda: 1000)
    with pytest.raises((CapacityError, Started)) as caught:
        VllmEngine(directory, RolloutConfig(), stop_token_ids=(1,), device=torch.device("cuda"))
    assert "rollout.gpu_memory_utilization is 0.9, which is 0.00 GiB" in str(caught.value)


class Sleeper:
    """vLLM's engine as far as an engine of ours calls it; it answers a request in its first step."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.waiting: list[str] = []

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        self.calls.append(f"sleep {level}")

    def wake_up(self, tags: list[str] | None = None) -> bool:
        self.calls.append(("wake", tags))
        return True

    def add_request(self, ticket: str, *arguments: Any, lora_request: None) -> None:
        self.calls.append("add")
        self.waiting.append(ticket)

    def collective_rpc(self, method: str, **arguments: Any) -> None:
        self.calls.append(method)

    def reset_prefix_cache(self, reset_running_requests: bool) -> None:
        self.calls.append("reset")

    def set_weight_version(self, version: str) -> None:
        pass

    def step(self) -> list[Any]:
        tickets, self.waiting = self.waiting, []
        span = SimpleNamespace(version="0", start=0, end=1)
        log_probs = SimpleNamespace(token_ids=[3], logprobs=[-1.0])
        answer = SimpleNamespace(token_ids=[3], logprobs=log_probs, weight_versions=[span], finish_reason="length")
        self.calls.append("step")
        return [SimpleNamespace(finished=True, request_id=ticket, outputs=[answer]) for ticket in tickets]


class SleepyEngine(VllmEngine):
    """An engine around a :class:`Sleeper`."""

    def __init__(self, directory: Path, config: RolloutConfig, *, takes_turns: bool = False) -> None:
        RolloutEngine.__init__(self, directory, config, stop_token_ids=(1,), takes_turns=takes_turns)
        self.sleeper = Sleeper()
        self._engine: Any = self.sleeper
        self._workers = WorkerProcesses()
        self._asleep, self._kept, self._routed, self._adapter = set(), None, None, None
        self._tickets, self._in_work, self.vocabulary, self._updates = itertools.count(), {}, 64, 0

    def _running(self) -> int:
        return 1

    def calls(self) -> list[Any]:
        """Those since the last look."""
        calls, self.sleeper.calls = self.sleeper.calls, []
        return calls


@pytest.mark.parametrize("sleeps", [True, False])
def test_an_engine_that_shares_a_gpu_is_awake_only_while_it_generates_and_its_weights_while_they_change(
    sleeps: bool, save_llama: SaveLlama
) -> None:
    model, directory = save_llama(0)
    share = ResourcesConfig(gpus_per_rank=0.4 if sleeps else 0.0)
    engine = SleepyEngine(directory, RolloutConfig(sleep=sleeps, resources=share))
    requests = make_requests([(0, [5, 6])], samples_per_prompt=1, max_new_tokens=1)
    resting: list[Any] = ["sleep 1"] if sleeps else []

    def waking(*parts: str) -> list[Any]:
        return [("wake", list(parts))] if sleeps else []

    update = ["start_weight_update", "update_weights", "finish_weight_update"]
    engine.receive(publish(0, weights_of(model)))
    assert engine.calls() == update, "an engine that has not slept is awake"
    engine.generate(requests, 10.0)
    assert engine.calls() == ["add", "step", *resting]
    engine.generate(requests, 10.0)
    assert engine.calls() == [*waking("weights", "kv_cache"), "add", "step", *resting]
    engine.receive(publish(0, weights_of(model)))
    assert engine.calls() == [*waking("weights"), *update], "no cache is needed to take weights"
    engine.generate(requests, 10.0)
    assert engine.calls() == [*waking("kv_cache"), "add", "step", *resting]
    with pytest.raises(RequestError):
        engine.generate([*requests, *requests], 10.0)
    assert not set(engine.calls()) - {"sleep 1"}, "a refused call wakes nothing"


def test_an_engine_that_takes_turns_sleeps_and_wakes_when_it_is_told_and_at_no_other_time(
    save_llama: SaveLlama,
) -> None:
    model, directory = save_llama(0)
    engine = SleepyEngine(
        directory, RolloutConfig(sleep=True, resources=ResourcesConfig(gpus_per_rank=0.2)), takes_turns=True
    )
    update, answer = ["start_weight_update", "update_weights", "finish_weight_update"], ["add", "step"]
    requests = make_requests([(0, [5, 6])], samples_per_prompt=1, max_new_tokens=1)
    for level, wanted in (
        (Level.AWAY, ["sleep 1"]),
        (Level.WEIGHTS, [("wake", ["weights"])]),
        (Level.WEIGHTS, []),
    ):
        engine.go_to(level)
        assert engine.calls() == wanted
    engine.receive(publish(0, weights_of(model)))
    assert engine.calls() == update
    engine.go_to(Level.ALL)
    assert engine.calls() == [("wake", ["kv_cache"])]
    engine.generate(requests, 10.0)
    engine.generate(requests, 10.0)
    assert engine.calls() == [*answer, *answer], "it stays awake between two calls of its turn"
    engine.submit(requests)
    with pytest.raises(RequestError, match="has 1 requests in work"):
        engine.go_to(Level.AWAY)
    engine.step()
    engine.calls()
    engine.go_to(Level.AWAY)
    engine.go_to(Level.ALL)
    assert engine.calls() == ["sleep 1", ("wake", ["weights", "kv_cache"])]


def test_vllm_sleeps_as_the_engine_expects(told: Callable[..., tuple[EngineArgs, UsageContext]]) -> None:
    assert {WEIGHTS, CACHE} == SLEEP_TAGS, "vLLM wakes other parts now: see what an engine must wake"
    for name in ("sleep", "wake_up"):
        ours, theirs = inspect.signature(getattr(Sleeper, name)), inspect.signature(getattr(LLMEngine, name))
        assert list(ours.parameters) == list(theirs.parameters)
    share = ResourcesConfig(gpus_per_rank=0.4)
    assert told(sleep=True, resources=share)[0].enable_sleep_mode
    assert not told()[0].enable_sleep_mode


def test_a_model_on_which_vllm_puts_no_adapter_is_refused_with_the_way_out(
    save_llama: SaveLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says so only when it loads the model."""
    import vllm

    refusal = inspect.getsource(LoRAModelRunnerMixin.load_lora_model)
    assert 'ValueError(f"{model.__class__.__name__} does not support LoRA yet.")' in refusal

    def from_engine_args(*arguments: Any) -> Any:
        raise ValueError("GPT2LMHeadModel does not support LoRA yet.")

    monkeypatch.setattr(vllm, "LLMEngine", type("LLMEngine", (), {"from_engine_args": staticmethod(from_engine_args)}))
    with pytest.raises(RequestError, match=r"GPT2LMHeadModel does not support LoRA yet\. Set rollout\.lora to merged"):
        VllmEngine(save_llama(0)[1], RolloutConfig(dtype="fp32", lora="adapter"), stop_token_ids=(1,), adapter_rank=8)
