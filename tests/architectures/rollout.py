"""One architecture as a policy whose answers vLLM samples: do trainer and engine agree before and after every update?"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.engine.weights import disk_weights
from rlhf_ray.models.actor import Actor
from rlhf_ray.models.save import save_pretrained
from rlhf_ray.models.weights.held import held_tensors
from rlhf_ray.rollout.requests import Generation, GenerationRequest, make_requests
from rlhf_ray.rollout.vllm_engine import VllmEngine
from rlhf_ray.rollout.wire import BUCKET_BYTES, Bucket, PublishedWeights, as_it_is, publish, shapes_on_disk
from tests.architectures.configs import TOKENS, VOCABULARY

DEADLINE_S = 120.0
FP32 = RolloutConfig(dtype="fp32", kv_cache_gib=0.1, max_model_tokens=128)
STOPS = (TOKENS["eos_token_id"],)


class Policy:
    """A policy in fp32, whose ``start`` is the directory that engines start from, as in a run."""

    def __init__(self, directory: Path) -> None:
        self.actor = Actor(str(directory), param_dtype="fp32", attn_implementation="sdpa").eval()
        for (
            module
        ) in self.actor.modules():  # where vLLM runs transformers' own model, it changes how its class is called
            type(module).do_not_compile = True
        self.start = directory.with_name(f"{directory.name}-start")
        save_pretrained(self.actor, None, self.start)

    def change(self, version: int) -> None:
        """Change every weight of the trainer. The sizes of weights stay, so that what an engine keeps is seen."""
        generator = torch.Generator().manual_seed(version)
        with torch.no_grad():
            for _, tensor in held_tensors(self.actor.model):
                if tensor.is_floating_point():
                    noise = torch.randn(tensor.shape, generator=generator)
                    tensor.add_(0.3 * tensor.std(correction=0).clamp_min(0.05) * noise)

    def changed(
        self, version: int, *, keep: Callable[[Bucket], Any] = as_it_is, bucket_bytes: int = BUCKET_BYTES
    ) -> PublishedWeights:
        """Change every weight and publish them all."""
        self.change(version)
        return self.published(version, keep=keep, bucket_bytes=bucket_bytes)

    def published(
        self, version: int, *, keep: Callable[[Bucket], Any] = as_it_is, bucket_bytes: int = BUCKET_BYTES
    ) -> PublishedWeights:
        """Publish every weight as it is."""
        groups = disk_weights(self.actor.model, receive=True)
        weights = (weight for group in groups for weight in group)
        return publish(version, weights, keep=keep, bucket_bytes=bucket_bytes)

    @torch.no_grad()
    def difference(self, requests: Sequence[GenerationRequest], generations: Sequence[Generation]) -> float:
        """The largest difference of a log-prob between engine and trainer, in nats."""
        return max(
            float((_log_probs(self.actor, request, generation) - torch.tensor(generation.log_probs)).abs().max())
            for request, generation in zip(requests, generations, strict=True)
        )


class Sampled:
    """A policy and the vLLM engine that samples from it, which reads no weights and gets all by an update, as in a run."""

    def __init__(self, directory: Path) -> None:
        self.policy = Policy(directory)
        shapes = shapes_on_disk(self.policy.start)
        self.engine = VllmEngine(self.policy.start, FP32, stop_token_ids=STOPS, seed=5, shapes=shapes)
        self.engine.receive(self.policy.published(0))

    def update(self, version: int) -> None:
        """Change every weight, in the policy and in the engine."""
        self.engine.receive(self.policy.changed(version))

    def difference(self) -> float:
        """The largest difference of a log-prob between engine and trainer, in nats."""
        requests = sampled_requests()
        return self.policy.difference(requests, self.engine.generate(requests, DEADLINE_S))


def over_updates(directory: Path, updates: int = 2) -> list[float]:
    """The difference at start, and after each of ``updates``."""
    sampled = Sampled(directory)
    try:
        differences = [sampled.difference()]
        for version in range(1, updates + 1):
            sampled.update(version)
            differences.append(sampled.difference())
    finally:
        sampled.engine.shutdown()
    return differences


def sampled_requests() -> list[GenerationRequest]:
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
