"""One architecture as a policy whose answers vLLM samples: do trainer and engine agree before and after every update?"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.engine.weights import disk_weights
from rlhf_ray.models.actor import Actor
from rlhf_ray.models.save import save_pretrained
from rlhf_ray.models.weights.held import held_tensors
from rlhf_ray.rollout.requests import Generation, GenerationRequest, make_requests
from rlhf_ray.rollout.vllm_engine import VllmEngine
from rlhf_ray.rollout.wire import publish
from tests.architectures.configs import TOKENS, VOCABULARY

DEADLINE_S = 120.0


def worst_over_updates(directory: Path, updates: int = 2) -> list[float]:
    """The largest difference of a log-prob (nats) at start, and after each of ``updates`` that change every weight.

    The engine starts from what the policy writes, and gets what the policy publishes, as in a run.
    """
    actor = Actor(str(directory), param_dtype="fp32", attn_implementation="sdpa").eval()
    for (
        module
    ) in actor.modules():  # where vLLM runs transformers' own model, it changes how the class is called, for all of it
        type(module).do_not_compile = True
    start = directory.with_name(f"{directory.name}-start")
    save_pretrained(actor, None, start)
    config = RolloutConfig(dtype="fp32", kv_cache_gib=0.1, max_model_tokens=128)
    engine = VllmEngine(start, config, stop_token_ids=(TOKENS["eos_token_id"],), seed=5)
    try:
        differences = [_difference(actor, engine)]
        for version in range(1, updates + 1):
            _change(actor, version)
            groups = disk_weights(actor.model, receive=True)
            engine.receive(publish(version, (weight for group in groups for weight in group)))
            differences.append(_difference(actor, engine))
    finally:
        engine.shutdown()
    return differences


@torch.no_grad()
def _change(actor: Actor, seed: int) -> None:
    """Other weights of the same sizes, so that what an engine keeps of the old ones is seen."""
    generator = torch.Generator().manual_seed(seed)
    for _, tensor in held_tensors(actor.model):
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.add_(0.3 * tensor.std(correction=0).clamp_min(0.05) * noise)


@torch.no_grad()
def _difference(actor: Actor, engine: VllmEngine) -> float:
    requests = _requests()
    generations = engine.generate(requests, DEADLINE_S)
    return max(
        float((_log_probs(actor, request, generation) - torch.tensor(generation.log_probs)).abs().max())
        for request, generation in zip(requests, generations, strict=True)
    )


def _requests() -> list[GenerationRequest]:
    """Prompts shorter and longer than the sliding windows."""
    generator = torch.Generator().manual_seed(3)
    lengths = (1, 5, 21, 9, 34, 2, 64, 13)
    prompts = [
        (row, torch.randint(3, VOCABULARY, (length,), generator=generator).tolist())
        for row, length in enumerate(lengths)
    ]
    return make_requests(prompts, samples_per_prompt=2, max_new_tokens=12)


def _log_probs(actor: Actor, request: GenerationRequest, generation: Generation) -> Tensor:
    ids = torch.tensor([request.token_ids + generation.token_ids])
    predictions: Tensor = actor(ids, return_logprobs=True)
    return predictions[0, len(request.token_ids) - 1 :]
