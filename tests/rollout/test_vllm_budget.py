"""Seeded requests of any number and length on the real vLLM: the token budget of a step ends no engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.rollout import vllm_engine
from rlhf_ray.rollout.errors import EngineDeadError
from rlhf_ray.rollout.requests import Generation, GenerationRequest, make_requests
from rlhf_ray.rollout.vllm_engine import VllmEngine
from rlhf_ray.rollout.wire import publish

from .llamas import EOS, VOCABULARY, largest_difference, make_llama, reference_log_probs, weights_of

pytestmark = pytest.mark.vllm
DEADLINE_S = 120.0
TOLERANCE = 1e-4
BUDGET = POSITIONS = 4096
"""Tokens of a step on CPU, where nothing else is said. A longest prompt fills one."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    directory = tmp_path_factory.mktemp("long")
    make_llama(0, positions=POSITIONS).save_pretrained(directory)
    config = RolloutConfig(dtype="fp32", kv_cache_gib=0.2, max_model_tokens=POSITIONS)
    engine = VllmEngine(directory, config, stop_token_ids=(EOS,), deterministic=True)
    yield engine
    engine.shutdown()


@pytest.mark.parametrize("nvidia_smi", [True, False])
@pytest.mark.parametrize(("device", "on_cpu"), [("cpu", True), ("cuda:0", False)])
def test_an_engine_is_one_for_its_device_with_or_without_nvidia_smi(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nvidia_smi: bool, device: str, on_cpu: bool
) -> None:
    """An engine for a GPU on a CPU takes nine tenths of the machine's memory; the reverse runs eager, with a tiny cache."""
    make_llama(0).save_pretrained(tmp_path)
    if nvidia_smi:
        (tmp_path / "nvidia-smi").touch(mode=0o755)
    asked: list[tuple[str, bool]] = []

    def engine_args(_: VllmEngine, on_cpu: bool) -> None:
        asked.append(("arguments", on_cpu))
        raise StopIteration

    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(vllm_engine, "prepare_process", lambda device: asked.append(("process", device.type == "cpu")))
    monkeypatch.setattr(VllmEngine, "_engine_args", engine_args)
    with pytest.raises(StopIteration):
        VllmEngine(tmp_path, RolloutConfig(dtype="fp32"), stop_token_ids=(EOS,), device=torch.device(device))
    assert asked == [("process", on_cpu), ("arguments", on_cpu)]


def requests_of(lengths: list[int], new_tokens: int) -> list[GenerationRequest]:
    generator = torch.Generator().manual_seed(1)
    prompts = [
        (row, torch.randint(2, VOCABULARY, (length,), generator=generator).tolist())
        for row, length in enumerate(lengths)
    ]
    return make_requests(prompts, samples_per_prompt=1, max_new_tokens=new_tokens, run_seed=0)


def update(engine: VllmEngine, version: int) -> None:
    engine.receive(publish(version, weights_of(make_llama(version, positions=POSITIONS))))


def generate(engine: VllmEngine, requests: list[GenerationRequest]) -> list[Generation]:
    try:
        return engine.generate(requests, DEADLINE_S)
    except EngineDeadError as error:
        raise AssertionError(f"the prompts of a step end the engine: {error}") from error


def step(engine: VllmEngine) -> list[Generation]:
    try:
        return engine.step()
    except EngineDeadError as error:
        raise AssertionError(f"what is computed again after an update ends the engine: {error}") from error


@pytest.mark.parametrize(
    ("lengths", "new_tokens"),
    [
        pytest.param([120] * 256, 2, id="256 prompts of 120 tokens"),
        pytest.param([BUDGET - 700, 5, 900, 3000, BUDGET - 3, BUDGET - 4, 60], 3, id="prompts as long as the budget"),
    ],
)
def test_seeded_prompts_beyond_a_steps_budget_give_the_same_bits_twice(
    engine: VllmEngine, lengths: list[int], new_tokens: int
) -> None:
    if engine.weight_version != 0:
        update(engine, 0)
    requests = requests_of(lengths, new_tokens)
    assert sum(lengths) > BUDGET == engine._engine.vllm_config.scheduler_config.max_num_batched_tokens
    first = generate(engine, requests)
    assert generate(engine, requests) == first
    some = slice(None, None, len(lengths) // 7)
    model = make_llama(0, positions=POSITIONS)
    assert largest_difference(model, requests[some], first[some], 1.0) < TOLERANCE


def test_an_update_in_the_middle_recomputes_more_than_a_steps_budget(engine: VllmEngine) -> None:
    requests = requests_of([*[120] * 60, BUDGET - 300], 12)
    assert through_an_update(engine, requests) == through_an_update(engine, requests)


def through_an_update(engine: VllmEngine, requests: list[GenerationRequest]) -> dict[object, Generation]:
    """Every answer that lived through an update after a few steps: the old model's tokens, then the new one's."""
    update(engine, 0)
    engine.submit(requests)
    done = [generation for _ in range(8) for generation in step(engine)]
    assert engine.unfinished > 20
    update(engine, 1)
    while engine.unfinished:
        done += step(engine)
    by_key = {generation.key: generation for generation in done}
    models = [make_llama(version, positions=POSITIONS) for version in (0, 1)]
    split = [request for request in requests if len(set(by_key[request.key].weight_versions)) == 2]
    assert len(split) > 20 and requests[-1] in split
    for request in [*split[:4], requests[-1]]:
        generation = by_key[request.key]
        for version, model in enumerate(models):
            difference = reference_log_probs(model, request, generation, 1.0) - torch.tensor(generation.log_probs)
            mine = torch.tensor(generation.weight_versions) == version
            assert float(difference[mine].abs().max()) < TOLERANCE
    return {key: by_key[key] for key in sorted(by_key)}
