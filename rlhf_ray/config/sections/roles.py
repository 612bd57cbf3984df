"""One role of a job: a model, the engine that runs it, and the ranks that hold it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from rlhf_ray.config.sections.base import Positive, Section
from rlhf_ray.config.sections.engine import EngineConfig, PlacementConfig, ResourcesConfig
from rlhf_ray.config.sections.models import ModelConfig


class TokenBudget(Section):
    """How many tokens, prompts included, a micro-batch on one rank may hold. Gradient accumulation follows from it."""

    max_tokens_per_micro_batch: Positive = 4096
    forward_factor: Positive = 2
    """A micro-batch without gradients may hold this many times as many tokens."""


class RoleConfig(Section):
    """A role: its model, its engine, and how many ranks hold it."""

    model: ModelConfig
    engine: EngineConfig = EngineConfig()
    ranks: Positive = 1
    resources: ResourcesConfig = ResourcesConfig()
    placement: PlacementConfig = PlacementConfig()
    max_tokens_per_micro_batch: Positive | None = None
    """Overrides ``batch.max_tokens_per_micro_batch`` for this role."""

    def training_tokens(self, batch: TokenBudget) -> int:
        """Tokens of a micro-batch with gradients."""
        return self.max_tokens_per_micro_batch or batch.max_tokens_per_micro_batch

    def forward_tokens(self, batch: TokenBudget) -> int:
        """Tokens of a micro-batch without gradients."""
        return self.training_tokens(batch) * batch.forward_factor


Scorer = Literal["packed", "vllm"]
Form = Literal["conversation", "text"]
"""``conversation``: prompt and answer are messages, written by the chat template. ``text``: both are joined as they are."""
ScoredToken = Literal["end", "before_end", "rendering"]
"""Where a score is read. ``end``: at the token that ends the answer. ``before_end``: at the last token before it.
``rendering``: at the last token of all that the chat template writes, such as a newline after the end of the turn."""


class ScoringRole(RoleConfig):
    """A reward model that scores and does not train."""

    scorer: Scorer = "packed"
    """What runs it: the packed forward on the role's engine, or vLLM's pooling runner."""
    form: Form | None = None
    """What it was trained on, where its directory does not say. Null: conversations if it has a chat template, else texts."""
    scored_token: ScoredToken | None = None
    """Where it was trained to be read, where its directory does not say. Null: at the end, or as transformers reads it."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.scorer == "vllm":
            yield from _vllm_conflicts(self)


def _vllm_conflicts(role: RoleConfig) -> Iterator[tuple[str, str]]:
    """What vLLM's pooling runner cannot do: it loads a plain model directory, unchanged, in one process."""
    model, ours = role.model, "or scorer to packed"
    if model.path is None:
        yield "scorer", f"vllm reads a model's directory, but this one is made here: name it in model.path, {ours}"
    elif model.head_init is not None:
        yield "scorer", f"vllm makes no fresh score head (model.head_init is {model.head_init}): train one, {ours}"
    if model.value_head_prefix != "score":
        named = f"(model.value_head_prefix is {model.value_head_prefix})"
        yield "scorer", f"vllm reads a head called score {named}: write one with rlhf-ray export, {ours}"
    if model.lora is not None:
        yield "scorer", f"vllm trains no adapters: remove model.lora, {ours}"
    if model.quantization is not None:
        yield "scorer", f"vllm runs the weights as they are: remove model.quantization, {ours}"
    if model.attention != "auto":
        yield "scorer", f"vllm chooses its attention itself: set model.attention to auto, {ours}"
    if role.ranks != 1:
        yield "scorer", f"vllm runs in one process: set ranks to 1 (serve: replicas instead of ranks), {ours}"
    if role.engine != EngineConfig():
        yield "scorer", f"vllm is an engine of its own: remove engine, {ours}"
