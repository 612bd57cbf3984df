"""One role of a job: its model, its engine, what it takes of the cluster. The vocabulary of every config's sections.

Always true: see :mod:`rlhf_ray.config.schema`, which holds the rest and the jobs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NonNegativeFloat = Annotated[float, Field(ge=0.0)]
Beta = Annotated[float, Field(ge=0.0, lt=1.0, strict=True)]

ZeroStage = Annotated[int, Field(ge=0, le=3)]
Dtype = Literal["bf16", "fp16", "fp32"]
Schedule = Literal[
    "constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt", "warmup_stable_decay"
]
Attention = Literal["auto", "flash_attention_3", "flash_attention_2", "varlen", "sdpa"]


class Absent(Exception):
    """A key whose value was wrong or missing was read, so what needs it cannot be checked."""


class Section(BaseModel):
    """One block of a config: unknown keys and wrong types are errors, values never change after parsing.

    Reading a declared key that a partial config lacks raises :class:`Absent`; any other unknown name is an
    ``AttributeError``, as everywhere.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, protected_namespaces=(), defer_build=True
    )

    if not TYPE_CHECKING:  # a type checker must go on refusing names that no field has

        def __getattr__(self, name: str) -> Any:
            if name in type(self).model_fields:
                raise Absent(f"{type(self).__name__}.{name}")
            return super().__getattr__(name)

    def is_default(self, key: str) -> bool:
        """Whether ``key`` has its default: a config that was written out names every key."""
        return bool(getattr(self, key) == type(self).model_fields[key].get_default())

    def conflicts(self) -> Iterator[tuple[str, str]]:
        """Values of this section that exclude each other: (key, or "" for all of it; what is wrong, the way out)."""
        return iter(())

    @model_validator(mode="after")
    def _has_no_conflicts(self) -> Self:
        found = [f"{key}: {text}".removeprefix(": ") for key, text in self.conflicts()]
        if found:
            raise ValueError("; ".join(found))
        return self


# --------------------------------------------------------------------------------------------------------------- models


class MakeConfig(Section):
    """A small model made on the spot, with random weights, where none can be downloaded."""

    shape: Literal["llama-tiny", "llama-0.5m", "llama-14m", "llama-120m"]
    tokenizer_from: str
    """``world`` (word tokens of the generated world), a data file whose text trains a byte-level BPE, or ``data``: what
    the job's own ``data`` section names (loading writes it out)."""
    vocabulary: Positive = 4096
    seed: NonNegative = 0


class LoraConfig(Section):
    rank: Positive
    alpha: Positive = 16
    dropout: Fraction = 0.0
    targets: Literal["all-linear"] | list[str] = "all-linear"


class ModelConfig(Section):
    """Where a model comes from and how it is held. Exactly one of ``path`` and ``make`` is set."""

    path: str | None = None
    make: MakeConfig | None = None
    revision: str | None = None
    dtype: Dtype = "bf16"
    attention: Attention = "auto"
    lora: LoraConfig | None = None
    quantization: Literal["nf4"] | None = None
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    head_init: Literal["hf", "inv_sqrt", "inv", "zero"] | None = None
    """How to make a fresh score head; none means that the checkpoint must hold one."""
    value_head_prefix: str = "score"

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if (self.path is None) == (self.make is None):
            yield "", "set exactly one of path (a directory or hub id) and make (a small model made here)"
        if self.revision is not None and self.path is None:
            yield "revision", "a made model has no revision: remove it, or name a hub id in path"
        if self.quantization is not None and self.dtype == "fp32":
            yield "quantization", f"{self.quantization} computes in half precision, but dtype is fp32: set it to bf16"


# --------------------------------------------------------------------------------------------------------------- engine


SCHEDULE_KEYS = {"restarts": "cosine_with_restarts", "power": "polynomial", "decay_fraction": "warmup_stable_decay"}
"""Keys that only one schedule reads."""


class OptimizerConfig(Section):
    """AdamW and its learning-rate schedule over ``update`` steps."""

    learning_rate: PositiveFloat
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.95), strict=False)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    schedule: Schedule = "constant"
    warmup_fraction: Fraction = 0.0
    final_fraction: Fraction = 0.0
    """The learning rate at the last update, as a share of ``learning_rate``; of no use to ``constant`` and
    ``inverse_sqrt``."""
    restarts: Positive = 1
    """How many cosines ``cosine_with_restarts`` goes through."""
    power: PositiveFloat = 1.0
    """Of ``polynomial``."""
    decay_fraction: Fraction = 0.2
    """Share of the run in which ``warmup_stable_decay`` falls, by a cosine."""
    max_grad_norm: PositiveFloat = 1.0

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if (
            self.schedule in ("constant", "inverse_sqrt")
            and self.final_fraction
            and not self.is_default("final_fraction")
        ):
            yield (
                "final_fraction",
                f"{self.final_fraction} has no effect: schedule is {self.schedule}; set it to cosine",
            )
        for key, schedule in SCHEDULE_KEYS.items():
            if self.schedule != schedule and not self.is_default(key):
                yield (
                    key,
                    f"{getattr(self, key)} belongs to the schedule {schedule}, but it is {self.schedule}: remove it",
                )
        if self.schedule == "warmup_stable_decay" and self.warmup_fraction + self.decay_fraction > 1.0:
            yield (
                "decay_fraction",
                f"{self.decay_fraction} and warmup_fraction {self.warmup_fraction} are more than the run: lower one",
            )


class EngineConfig(Section):
    """One DeepSpeed engine. Without an optimizer it runs forward only."""

    zero: ZeroStage = 0
    offload: Literal["none", "optimizer", "all"] = "none"
    optimizer: OptimizerConfig | None = None

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.zero in (1, 2) and self.optimizer is None:
            yield "zero", f"stage {self.zero} shards an optimizer, but there is none: set 0 or 3, or add optimizer"
        if self.offload == "optimizer" and self.optimizer is None:
            yield "offload", "there is no optimizer to offload: add optimizer, or set offload to none"
        if self.offload == "optimizer" and self.zero == 0:
            yield "offload", "optimizer needs ZeRO: set zero to 1, 2 or 3, or offload to none"
        if self.offload == "all" and self.zero != 3:
            yield "offload", f"all moves parameters, but zero is {self.zero}: set zero to 3, or offload to optimizer"


class ResourcesConfig(Section):
    """What one rank (of ``rollout``: one engine with all its tensor-parallel workers) takes of the cluster."""

    cpus_per_rank: PositiveFloat = 1.0
    gpus_per_rank: NonNegativeFloat = 0.0
    threads_per_rank: Positive = 1


class TokenBudget(Section):
    """Tokens, prompts included, of one micro-batch on one rank; gradient accumulation follows and is never set."""

    max_tokens_per_micro_batch: Positive = 4096
    forward_factor: Positive = 2
    """How many times as many tokens a micro-batch without gradients may hold."""


class RoleConfig(Section):
    """One role: its model, its engine, and how many ranks hold it."""

    model: ModelConfig
    engine: EngineConfig = EngineConfig()
    ranks: Positive = 1
    resources: ResourcesConfig = ResourcesConfig()
    max_tokens_per_micro_batch: Positive | None = None
    """Overrides ``batch.max_tokens_per_micro_batch`` for this role."""

    def training_tokens(self, batch: TokenBudget) -> int:
        """Tokens of one micro-batch of this role that is trained on."""
        return self.max_tokens_per_micro_batch or batch.max_tokens_per_micro_batch

    def forward_tokens(self, batch: TokenBudget) -> int:
        """Tokens of one micro-batch of this role without gradients."""
        return self.training_tokens(batch) * batch.forward_factor


Scorer = Literal["packed", "vllm"]


class ScoringRole(RoleConfig):
    """A reward model that scores and does not train."""

    scorer: Scorer = "packed"
    """What runs it: the packed forward on the role's engine, or vLLM's pooling runner."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.scorer == "vllm":
            yield from _vllm_conflicts(self)


def _vllm_conflicts(role: RoleConfig) -> Iterator[tuple[str, str]]:
    """What vLLM's pooling runner does not take: it loads a plain directory, whole, in one process."""
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
