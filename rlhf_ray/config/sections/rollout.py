"""The ``rollout`` section: the engines that generate answers, and how tokens are sampled."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rlhf_ray.config.sections.base import Fraction, FreeValues, NonNegative, Positive, PositiveFloat, Section
from rlhf_ray.config.sections.engine import PlacementConfig, ResourcesConfig
from rlhf_ray.config.sections.models import Dtype
from rlhf_ray.user_code import ENVIRONMENTS, spelling_problem


class EnvironmentConfig(Section):
    """The environment that answers the policy's answers, turn by turn, and gives the rewards."""

    name: str
    """``package.module:name``, ``path.py:name``, or an installed entry point: the class of an episode."""
    parameters: FreeValues = {}  # noqa: RUF012 (pydantic copies it)
    """What each episode is made with."""
    max_turns: Positive = 8
    """Answers of an episode; one that its environment has not ended by then is cut off."""
    timeout_s: PositiveFloat = 60.0
    """Seconds that one step of an environment may take."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if problem := spelling_problem(self.name, (), ENVIRONMENTS):
            yield "name", problem


DELTA_SHARE = 0.5
"""Of the bytes of all weights: changes that take more of them are not published beside the weights (``weight_delta``)."""


class RolloutConfig(Section):
    """The rollout engines and how they sample."""

    backend: Literal["vllm", "transformers"] = "vllm"
    engines: Positive = 1
    max_restarts: NonNegative = 5
    """How often an engine that died is started again in its place. 0: never, and the others do its work."""
    max_new_tokens: Positive = 32
    stop_tokens: list[str] = []  # noqa: RUF012 (pydantic copies it)
    """Tokens that end an answer, besides the tokenizer's end of sequence."""
    temperature: PositiveFloat = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: NonNegative = 0
    min_p: Fraction = 0.0
    max_model_tokens: Positive = 512
    dtype: Dtype = "bf16"
    kv_cache_gib: PositiveFloat = 1.0
    max_num_seqs: Positive | None = None
    """Answers that an engine samples at once. Null: what vLLM's offline class takes on this device."""
    max_num_batched_tokens: Positive | None = None
    """Tokens of one step of an engine, of prompts and answers together. Null: likewise."""
    tensor_parallel: Positive = 1
    gpu_memory_utilization: Fraction = 0.9
    routing_replay: bool = False
    """Train a mixture of experts with the experts that the engine chose for each token."""
    weight_transport: Literal["auto", "object_store"] = "auto"
    weight_delta: bool = False
    """Send an engine only what changed since the weights that it holds, through the object store."""
    lora: Literal["merged", "adapter"] = "merged"
    """Whether LoRA of the policy reaches the engines as part of the weights, or alone, beside a base that they keep."""
    sleep: bool = False
    """Give the memory of weights and KV cache back while nothing is generated, on a GPU that other roles share."""
    resources: ResourcesConfig = ResourcesConfig()
    placement: PlacementConfig = PlacementConfig()
    timeout_s: PositiveFloat = 300.0
    update_timeout_s: PositiveFloat = 60.0
    """Seconds that an engine has at least for an update of its weights, after the first."""
    mode: Literal["sync", "one_step_off", "windowed"] = "sync"
    """Whether a step samples before it learns, while the step before it learns, or up to ``window`` steps ahead."""
    window: Positive = 2
    """Steps that ``windowed`` samples ahead at most."""
    partial: bool = False
    """In ``windowed``: answers in work when weights change go on under the new ones. False: they are finished first."""
    environment: EnvironmentConfig | None = None
    """Null: an episode is one answer."""

    @property
    def cuts(self) -> bool:
        """Whether tokens are sampled from less than the whole vocabulary."""
        return self.top_p < 1.0 or self.top_k > 0 or self.min_p > 0.0

    @property
    def staleness(self) -> int:
        """How many publications older than the newest the weights may be that sampled the tokens of a step, in this mode."""
        return {"sync": 0, "one_step_off": 1, "windowed": self.window}[self.mode]

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.top_k == 1:
            yield (
                "top_k",
                "1 leaves no choice: every token has probability 1, whatever the weights, so nothing is learned: set it to 2 "
                "or more, or to 0 for the whole vocabulary",
            )
        if self.cuts and self.top_k == 0 and self.backend == "vllm" and self.resources.gpus_per_rank > 0:
            yield (
                "top_k",
                f"0 with top_p {self.top_p:g} and min_p {self.min_p:g}, but on a GPU vLLM returns the tokens that were kept, "
                "which the trainer needs, only where top_k bounds their number: set it, to 1000 for example",
            )
        if self.sleep and not (self.backend == "vllm" and 0 < self.resources.gpus_per_rank < 1):
            yield (
                "sleep",
                f"true, but it is for a vllm engine that shares a GPU with other roles (backend is {self.backend}, "
                f"resources.gpus_per_rank {self.resources.gpus_per_rank:g}): remove it",
            )
        if self.partial and self.mode != "windowed":
            yield (
                "partial",
                f"true, but in mode {self.mode} no answer is in work when weights change: set mode to windowed, or remove it",
            )
        if self.sleep and self.mode != "sync":
            yield (
                "sleep",
                f"true, but in mode {self.mode} the engines sample while the trainer learns, so that both need the memory: set "
                "mode to sync, or give the engines GPUs of their own and remove sleep",
            )
        if self.lora == "adapter" and self.backend != "vllm":
            yield "lora", f"adapter, but a {self.backend} engine takes none: set it to merged, or backend to vllm"
        if self.lora == "adapter" and self.weight_delta:
            yield (
                "lora",
                "adapter, but then no weights travel whose changes weight_delta could send: remove weight_delta",
            )
        if self.lora == "adapter" and self.sleep:
            yield "lora", "adapter, which an engine whose cache sleeps may not take: set it to merged, or remove sleep"
        tokens, sequences = self.max_num_batched_tokens, self.max_num_seqs
        if self.backend == "transformers" and tokens is not None:
            yield "max_num_batched_tokens", f"{tokens}, but only vllm counts the tokens of a step: remove it"
        if self.backend == "transformers" and self.tensor_parallel > 1:
            yield (
                "tensor_parallel",
                f"{self.tensor_parallel}, but a transformers engine has one process: set it to 1, or backend to vllm",
            )
        # On a GPU vLLM cuts a long prompt into the steps of several.
        longest = self.max_model_tokens if self.resources.device == "cpu" else None
        for name, least in (("max_num_seqs", sequences), ("max_model_tokens", longest)):
            if tokens is not None and least is not None and tokens < least:
                yield (
                    "max_num_batched_tokens",
                    f"{tokens} is below {name}, {least}, and a step holds at least that: raise it to {least}, or remove it",
                )
