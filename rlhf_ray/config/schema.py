"""What a job is: the typed, strict description of every run.

Always true: a key that is not written here is refused; a value is never coerced from another type; every default
stands here and nowhere else; importing this module imports neither torch nor ray. What two values of one section may
not be together stands in its ``conflicts``; checks across sections stand in :mod:`rlhf_ray.config.checks`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rlhf_ray.config.algorithm import (
    AlgorithmConfig,
    ImportanceConfig,
    KlConfig,
    MissingEosConfig,
    OverlongConfig,
    ShapingConfig,
    TooShortConfig,
)
from rlhf_ray.config.data_section import DataConfig, SourceConfig, WorldConfig
from rlhf_ray.config.reward_training import NormalizationConfig, RewardLossConfig, RewardTrainingRole
from rlhf_ray.config.rewards import SHIPPED_FUNCTIONS, RewardConfig, RewardSourceConfig, RewardTermConfig
from rlhf_ray.config.roles import (
    Attention,
    Dtype,
    EngineConfig,
    Fraction,
    LoraConfig,
    MakeConfig,
    ModelConfig,
    NonNegative,
    NonNegativeFloat,
    OptimizerConfig,
    Positive,
    PositiveFloat,
    ResourcesConfig,
    RoleConfig,
    ScoringRole,
    Section,
    TokenBudget,
)
from rlhf_ray.config.serving import ServiceConfig

__all__ = [
    "JOBS",
    "AlgorithmConfig",
    "Attention",
    "BatchConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "DataConfig",
    "Dtype",
    "EngineConfig",
    "EvaluationConfig",
    "ImportanceConfig",
    "JobConfig",
    "KlConfig",
    "LoraConfig",
    "MakeConfig",
    "MissingEosConfig",
    "ModelConfig",
    "MonitoringConfig",
    "NormalizationConfig",
    "OptimizerConfig",
    "OverlongConfig",
    "PairBatchConfig",
    "PpoConfig",
    "PpoEvaluationConfig",
    "ResourcesConfig",
    "RewardConfig",
    "RewardEvaluationConfig",
    "RewardLossConfig",
    "RewardModelConfig",
    "RewardSourceConfig",
    "RewardTermConfig",
    "RewardTrainingRole",
    "RoleConfig",
    "RolloutConfig",
    "RunConfig",
    "ScoringRole",
    "Section",
    "SequenceBatchConfig",
    "ServeConfig",
    "ServiceConfig",
    "SftConfig",
    "ShapingConfig",
    "SourceConfig",
    "TokenBudget",
    "TooShortConfig",
    "TrainingConfig",
    "WorldConfig",
]

# ------------------------------------------------------------------------------------------------------------ the rooms


class RunConfig(Section):
    name: str = Field(
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$",
        description="a name of letters, digits, '_', '.' and '-' that starts with a letter or digit",
    )
    root: str = "runs"
    """The run directory is ``root/name``."""
    seed: NonNegative = 0
    deterministic: bool = False
    max_consecutive_skips: Positive = 5
    max_restarts: NonNegative = 0
    """How often the supervising parent restarts a driver that died, from its last commit."""


class ClusterConfig(Section):
    address: str | None = None
    """Ray address to join (``auto`` or ``host:port``); none starts Ray on this machine, or joins the job's cluster."""
    num_cpus: Positive | None = None
    """CPUs that Ray offers where this run starts it; none means the machine's."""
    object_store_mb: Positive = 512
    dashboard: bool = False
    """Serve Ray's dashboard where this run starts Ray itself."""
    placement_timeout_s: PositiveFloat = 60.0
    start_timeout_s: PositiveFloat = 300.0
    call_timeout_s: PositiveFloat = 600.0

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.address is not None and self.num_cpus is not None:
            yield "num_cpus", f"{self.num_cpus} counts only where Ray is started here: remove it, or address"


class BatchConfig(TokenBudget):
    """Sizes of reinforcement learning, all global."""

    prompts_per_step: Positive
    samples_per_prompt: Positive = 1
    sequences_per_update: Positive
    passes_per_step: Positive = 1

    @property
    def sequences_per_step(self) -> int:
        return self.prompts_per_step * self.samples_per_prompt

    def conflicts(self) -> Iterator[tuple[str, str]]:
        step, update = self.sequences_per_step, self.sequences_per_update
        if step % update:
            divisors = [size for size in range(1, step + 1) if step % size == 0]
            nearest = min(divisors, key=lambda size: (abs(size - update), size))
            yield (
                "sequences_per_update",
                f"{update} does not divide the {step} sequences of a step (prompts_per_step {self.prompts_per_step} x "
                f"samples_per_prompt {self.samples_per_prompt}): the nearest size that does is {nearest}",
            )


class SequenceBatchConfig(TokenBudget):
    """Sizes of supervised fine-tuning: ``sequences_per_update`` is global."""

    sequences_per_update: Positive


class PairBatchConfig(TokenBudget):
    """Sizes of preference training: ``pairs_per_update`` is global."""

    pairs_per_update: Positive


class RolloutConfig(Section):
    backend: Literal["vllm", "transformers"] = "vllm"
    engines: Positive = 1
    max_new_tokens: Positive = 32
    stop_tokens: list[str] = []  # noqa: RUF012 (pydantic copies it)
    """Tokens that end an answer, beside the tokenizer's end of sequence."""
    temperature: PositiveFloat = 1.0
    top_p: PositiveFloat = 1.0
    top_k: int = 0
    min_p: NonNegativeFloat = 0.0
    max_model_tokens: Positive = 512
    dtype: Dtype = "bf16"
    kv_cache_gib: PositiveFloat = 1.0
    tensor_parallel: Positive = 1
    gpu_memory_utilization: Fraction = 0.9
    resources: ResourcesConfig = ResourcesConfig()
    timeout_s: PositiveFloat = 300.0


class EvaluationConfig(Section):
    every_steps: NonNegative = 0
    """0 evaluates only at the end."""


class RewardEvaluationConfig(EvaluationConfig):
    keep_best: bool = True
    """Whether ``best/`` keeps the weights of the evaluation with the highest accuracy."""
    worst_pairs: NonNegative = 20
    """Wrong pairs that the report shows, the worst first."""


class PpoEvaluationConfig(EvaluationConfig):
    """How answers to held-out prompts are drawn and judged."""

    prompts: Positive = 300
    samples_per_prompt: Positive = 1
    greedy: bool = False
    """The likeliest token each time, instead of samples at the training temperature."""
    gold: str | None = None
    """A function that knows the truth, as ``reward.function`` names one; none: the generated world's, where it has one."""
    pass_at: list[Positive] = []  # noqa: RUF012 (pydantic copies it)
    """The k of pass@k: an answer is right where its gold (or else its reward) is 1 or more."""
    best_of: NonNegative = 0
    """Largest n of best-of-n of the starting policy (0: none)."""
    samples_shown: NonNegative = 3
    """Prompts whose answers are shown in the log at each evaluation."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.greedy and self.samples_per_prompt > 1:
            yield (
                "samples_per_prompt",
                f"{self.samples_per_prompt} greedy answers to a prompt are all the same: set it to 1",
            )
        too_large = [k for k in self.pass_at if k > self.samples_per_prompt]
        if too_large:
            yield "pass_at", f"{too_large[0]} of {self.samples_per_prompt} samples: raise samples_per_prompt to it"
        if self.gold is not None and self.gold.count(":") != 1 and self.gold not in SHIPPED_FUNCTIONS:
            shipped = ", ".join(SHIPPED_FUNCTIONS)
            yield "gold", f"{self.gold!r} is none of package.module:name, path.py:name, {shipped}"


class CheckpointConfig(Section):
    every_steps: NonNegative = 0
    """0 keeps only the final weights."""
    keep: Positive = 2


class MonitoringConfig(Section):
    ray_metrics: bool = True
    tensorboard: bool = False
    samples_per_log: NonNegative = 4


# ------------------------------------------------------------------------------------------------------------- the jobs


class SftConfig(Section):
    """Supervised fine-tuning of a policy on demonstrations."""

    kind: Literal["sft"]
    run: RunConfig
    cluster: ClusterConfig = ClusterConfig()
    batch: SequenceBatchConfig
    policy: RoleConfig
    data: DataConfig
    epochs: PositiveFloat = 1.0
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitoring: MonitoringConfig = MonitoringConfig()


class RewardModelConfig(Section):
    """Training a reward model on preference pairs."""

    kind: Literal["rm"]
    run: RunConfig
    cluster: ClusterConfig = ClusterConfig()
    batch: PairBatchConfig
    reward: RewardTrainingRole
    data: DataConfig
    loss: RewardLossConfig = RewardLossConfig()
    normalization: NormalizationConfig = NormalizationConfig()
    epochs: PositiveFloat = 1.0
    save: Literal["merged", "adapter"] = "merged"
    """What of a model with LoRA is written: whole weights with the adapter merged into them, or adapter and head alone."""
    evaluation: RewardEvaluationConfig = RewardEvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitoring: MonitoringConfig = MonitoringConfig()


class PpoConfig(Section):
    """PPO: a policy improved against a reward, held near a reference by KL."""

    kind: Literal["ppo"]
    run: RunConfig
    cluster: ClusterConfig = ClusterConfig()
    batch: BatchConfig
    policy: RoleConfig
    critic: RoleConfig | None = None
    """None where the algorithm has no critic."""
    reference: RoleConfig | None = None
    """None: the starting policy, on one rank, forward only (``reference_role``)."""
    reward: RewardConfig
    rollout: RolloutConfig = RolloutConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    data: DataConfig
    steps: Positive
    """PPO steps of the whole run: each samples ``batch.prompts_per_step`` prompts."""
    evaluation: PpoEvaluationConfig = PpoEvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    expose: ServiceConfig | None = None
    """A port that answers with the scores of this run's reward models, while it runs."""

    @property
    def reference_role(self) -> RoleConfig | None:
        """The reference as it runs: ``reference``, or the starting policy without adapters; none where no KL is measured."""
        if not self.algorithm.kl.measure:
            return None
        if self.reference is not None:
            return self.reference
        start = self.policy.model.model_copy(update={"lora": None, "gradient_checkpointing": False})
        return RoleConfig(
            model=start,
            resources=self.policy.resources,
            max_tokens_per_micro_batch=self.policy.max_tokens_per_micro_batch,
        )


class ServeConfig(ServiceConfig):
    """Reward models served over HTTP."""

    kind: Literal["serve"]
    run: RunConfig
    cluster: ClusterConfig = ClusterConfig()
    reward: ScoringRole
    name: Annotated[str, Field(min_length=1)] = "reward"
    """What requests may call it, besides its path."""
    models: dict[Annotated[str, Field(pattern=r"^[A-Za-z][\w.-]*$")], ScoringRole] = {}  # noqa: RUF012 (pydantic copies it)
    """Further models, by the names that requests call them."""
    replicas: Positive = 1
    max_tokens: Positive = 4096

    @property
    def served(self) -> dict[str, ScoringRole]:
        """Every model by its name, the one for requests that name none first."""
        return {self.name: self.reward, **self.models}


TrainingConfig = SftConfig | RewardModelConfig | PpoConfig
JobConfig = TrainingConfig | ServeConfig
JOBS: dict[str, type[Section]] = {"sft": SftConfig, "rm": RewardModelConfig, "ppo": PpoConfig, "serve": ServeConfig}
