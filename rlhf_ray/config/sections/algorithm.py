"""The ``algorithm`` section: the mathematics of a PPO run, and the named algorithms that choose its parts.

Invariants: ``name`` decides nothing by itself. It fills in the keys that a config leaves out, once, when the config is
read; the resolved config states every part, and only the parts are looked at afterwards. The defaults of the fields are
those of ``ppo``; ``PRESETS`` holds what every other name chooses instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from rlhf_ray.config.sections.base import (
    Fraction,
    FreeValues,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
)
from rlhf_ray.user_code import ADVANTAGES, COLLECTORS, OBJECTIVES, spelling_problem

AlgorithmName = Literal[
    "ppo", "grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "gspo", "dapo", "cispo", "distill"
]
Whitening = Literal["none", "population", "unbiased"]
COMPARING_ADVANTAGES = ("leave_one_out", "group_mean", "group_norm")
SHIPPED_ADVANTAGES = ("gae", "reward_to_go", *COMPARING_ADVANTAGES)
SHIPPED_OBJECTIVES = ("clip", "cispo", "dppo_tv", "dppo_kl")
EXCHANGEABLE_PARTS: Mapping[str, tuple[tuple[str, ...], str]] = MappingProxyType(
    {
        "advantages": (SHIPPED_ADVANTAGES, ADVANTAGES),
        "objective": (SHIPPED_OBJECTIVES, OBJECTIVES),
        "collector": ((), COLLECTORS),
    }
)
"""For each key that may name a part of the user's own: the names of shipped parts, and the group of entry points."""
OR_YOUR_OWN = "or one of your own, as path.py:name"

NO_KL = {"coefficient": 0.0, "measure": False}
WITHOUT_CRITIC = {"lam": None, "value_clip": None, "whitening": "none"}
AGAINST_GROUP = {**WITHOUT_CRITIC, "advantages": "group_norm"}

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "ppo": {},
        # Shao et al. 2024
        "grpo": {
            **AGAINST_GROUP,
            "aggregation": "sequences",
            "kl": {"coefficient": 0.04, "estimator": "k3", "applied_to": "loss"},
        },
        # Liu et al. 2025
        "dr_grpo": {**WITHOUT_CRITIC, "advantages": "group_mean", "aggregation": "constant", "kl": NO_KL},
        # Ahmadian et al. 2024, with the clipped ratio of the whole answer that TRL adds
        "rloo": {
            **WITHOUT_CRITIC,
            "advantages": "leave_one_out",
            "ratio": "trajectory",
            "aggregation": "sequences",
        },
        # Hu et al. 2025
        "reinforce++": {**WITHOUT_CRITIC, "advantages": "reward_to_go", "whitening": "population"},
        "reinforce++_baseline": {
            **WITHOUT_CRITIC,
            "advantages": "group_mean",
            "whitening": "population",
            "kl": {"estimator": "k2", "applied_to": "loss"},
        },
        # Zheng et al. 2025
        "gspo": {
            **AGAINST_GROUP,
            "ratio": "sequence",
            "aggregation": "sequences",
            "clip_low": 3e-4,
            "clip_high": 4e-4,
            "kl": NO_KL,
        },
        # Yu et al. 2025
        "dapo": {
            **AGAINST_GROUP,
            "clip_high": 0.28,
            "dynamic_sampling": 3,
            "shaping": {"overlong": {"buffer_fraction": 0.2, "penalty": 1.0}},
            "kl": NO_KL,
        },
        # MiniMax-M1 2025; the bound is ScaleRL's (Khatri et al. 2025)
        "cispo": {**AGAINST_GROUP, "objective": "cispo", "clip_low": None, "clip_high": 4.0, "kl": NO_KL},
        # Gu et al. 2024, Agarwal et al. 2024; token by token, as Lu et al. 2025
        "distill": {
            **WITHOUT_CRITIC,
            "advantages": "reward_to_go",
            "gamma": 0.0,
            "kl": {"coefficient": 1.0, "estimator": "k1", "applied_to": "reward"},
        },
    }
)


def with_preset(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of an ``algorithm`` section, with those that its name chooses where the section has none."""
    name = values.get("name", "ppo")
    return _filled(values, PRESETS.get(name, {}) if isinstance(name, str) else {})


def _filled(values: Mapping[str, Any], preset: Mapping[str, Any]) -> dict[str, Any]:
    filled = dict(values)
    for key, chosen in preset.items():
        own = filled.setdefault(key, chosen)
        if isinstance(own, Mapping) and isinstance(chosen, Mapping):
            filled[key] = _filled(own, chosen)
    return filled


class KlConfig(Section):
    """How far the policy may move from its reference, as a penalty on the KL divergence (in nats)."""

    coefficient: NonNegativeFloat = 0.05
    estimator: Literal["k1", "k2", "k3"] = "k1"
    applied_to: Literal["reward", "loss"] = "reward"
    """Whether the KL is a penalty in the token rewards, or a term of the policy loss."""
    gradient: Literal["unbiased", "plain"] = "unbiased"
    """The gradient of the term in the loss: that of the KL itself (unbiased), or that of the estimator (plain)."""
    target: PositiveFloat | None = None
    """Nats per sequence that adaptive control (Ziegler et al. 2019) aims at; null keeps the coefficient fixed."""
    horizon: Positive = 10000
    """Sequences over which adaptive control reacts: a larger number changes the coefficient more slowly."""
    measure: bool = True
    """Whether there is a reference model at all; without one the KL is unknown."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.target is not None and self.coefficient == 0.0:
            yield "coefficient", "0 stays 0 under adaptive control (target is set): start it above 0, such as 0.05"
        if not self.measure and self.coefficient > 0.0:
            yield (
                "coefficient",
                f"{self.coefficient:g} needs a reference, but measure is false: set measure to true, or coefficient to 0",
            )
        if self.gradient == "plain" and self.applied_to == "reward":
            yield "gradient", "plain has no effect: a penalty in the rewards has no gradient; remove it"
        if self.gradient == "plain" and self.applied_to == "loss" and self.estimator == "k1":
            yield (
                "gradient",
                "plain k1 in the loss pulls nowhere (its gradient is 0 on average): set it to unbiased, or estimator to k2",
            )


class MissingEosConfig(Section):
    """What happens to the score of an answer that did not end by itself: ``value`` is subtracted from it, replaces it, or
    multiplies it."""

    rule: Literal["subtract", "replace", "scale"]
    value: float


class OverlongConfig(Section):
    """A penalty on answers near the length limit (soft overlong punishment, Yu et al. 2025)."""

    buffer_fraction: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    """The last share of ``rollout.max_new_tokens``, over which the penalty grows from 0 to ``penalty``."""
    penalty: PositiveFloat = 1.0


class TooShortConfig(Section):
    """A penalty on answers of fewer than ``tokens`` tokens."""

    tokens: Positive
    penalty: PositiveFloat = 1.0


class ShapingConfig(Section):
    """What is done to the score of an answer before it becomes token rewards, in the order of the keys."""

    normalize: Literal["none", "running", "running_scale"] = "none"
    scale: PositiveFloat = 1.0
    clip: PositiveFloat | None = None
    overlong: OverlongConfig | None = None
    too_short: TooShortConfig | None = None
    missing_eos: MissingEosConfig | None = None
    placement: Literal["last_action", "spread"] = "last_action"
    whitening: Whitening = "none"


class ImportanceConfig(Section):
    """Importance weights that correct for probabilities in which the rollout engine and the trainer differ."""

    level: Literal["none", "token", "sequence"] = "token"
    rule: Literal["truncate", "mask"] = "truncate"
    low: NonNegativeFloat = 0.0
    high: PositiveFloat = 2.0
    gating: Literal["ratio", "geometric_mean", "binary_kl", "tv"] = "ratio"
    """What the bounds are of: the weight itself, the geometric mean of an answer's ratios, or a divergence of both policies."""

    def conflicts(self) -> Iterator[tuple[str, str]]:
        if self.gating != "ratio" and self.level == "none":
            yield "gating", f"{self.gating} has no effect, since level is none: set level to token or sequence"
            return
        if self.gating != "ratio" and self.rule != "mask":
            yield "rule", f"{self.rule}, but gating {self.gating} drops what is outside of the bounds: set it to mask"
        if self.gating == "geometric_mean" and self.level == "token":
            yield (
                "level",
                "token, but gating geometric_mean is of a whole answer: set it to sequence, or gating to ratio",
            )
        if self.gating in ("binary_kl", "tv"):
            if self.low > 0.0:
                yield "low", f"{self.low:g}, but a divergence (gating {self.gating}) is bounded from above: set it to 0"
            if self.gating == "tv" and self.high >= 1.0:
                yield "high", f"{self.high:g}, but no total variation is above 1: set it below, such as 0.1"
            if self.gating == "binary_kl" and self.high == ImportanceConfig.model_fields["high"].default:
                yield (
                    "high",
                    f"{self.high:g} is the default for ratios: set it in nats for gating binary_kl, such as 0.05",
                )
            return
        if not self.low < 1.0 < self.high:
            yield (
                "",
                f"low {self.low:g} and high {self.high:g} must have 1, the weight of equal log-probs, between them",
            )


class PartParameters(Section):
    """What the constructors of parts of your own are called with, by keyword."""

    objective: FreeValues = {}  # noqa: RUF012 (pydantic copies it)
    advantages: FreeValues = {}  # noqa: RUF012
    collector: FreeValues = {}  # noqa: RUF012


class AlgorithmConfig(Section):
    """Which advantages, which loss and which penalties a PPO run uses. docs/algorithms.md gives their formulas."""

    name: AlgorithmName = "ppo"
    advantages: Annotated[str, Field(description=f"{', '.join(SHIPPED_ADVANTAGES)}, {OR_YOUR_OWN}")] = "gae"
    """One of :data:`SHIPPED_ADVANTAGES`, or an estimator of your own (:mod:`rlhf_ray.user_code` says how to name it)."""
    gamma: Fraction = 1.0
    lam: Fraction | None = 0.95
    """Lambda of generalised advantage estimation (``gae``); null for every other estimator."""
    whitening: Whitening = "population"
    """How advantages are standardised, over all actions of the step."""
    objective: Annotated[str, Field(description=f"{', '.join(SHIPPED_OBJECTIVES)}, {OR_YOUR_OWN}")] = "clip"
    """One of :data:`SHIPPED_OBJECTIVES`, or an objective of your own."""
    ratio: Literal["token", "sequence", "trajectory"] = "token"
    aggregation: Literal["tokens", "sequences", "constant"] = "tokens"
    clip_low: Annotated[float, Field(gt=0.0, le=1.0)] | None = 0.2
    clip_high: PositiveFloat = 0.2
    dual_clip: Annotated[float, Field(gt=1.0)] | None = None
    value_clip: PositiveFloat | None = 0.2
    entropy_coefficient: NonNegativeFloat = 0.0
    mask_truncated: bool = False
    dynamic_sampling: NonNegative = 0
    """How often further prompts may be sampled in place of those whose samples all score the same; 0 keeps such prompts."""
    collector: str | None = None
    """A way of your own to collect the samples of a step; none for the project's."""
    parameters: PartParameters = PartParameters()
    kl: KlConfig = KlConfig()
    shaping: ShapingConfig = ShapingConfig()
    importance: ImportanceConfig = ImportanceConfig()
    old_log_probs: Literal["policy", "rollout"] = "policy"
    """Who says how likely the sampled tokens were: the policy, in a pass of its own, or the engine that sampled them."""
    critic_warmup_steps: NonNegative = 0
    """Steps at the start in which the critic alone trains."""
    max_staleness: NonNegative | None = None
    """How many publications of weights to the engines an answer may be older than the newest; null: what ``rollout.mode``
    needs."""

    @model_validator(mode="before")
    @classmethod
    def _choose_parts(cls, values: Any) -> Any:
        return with_preset(values) if isinstance(values, Mapping) else values

    @property
    def has_critic(self) -> bool:
        """Whether the advantages are computed from the values of a critic."""
        return self.advantages == "gae"

    @property
    def compares_samples(self) -> bool:
        """Whether the advantages are computed from the other answers to the same prompt."""
        return self.advantages in COMPARING_ADVANTAGES

    @property
    def own_parts(self) -> dict[str, str]:
        """The parts of the user's own, by the keys that name them; a key without a valid value has none."""
        names = {key: self.__dict__.get(key) for key in EXCHANGEABLE_PARTS}
        return {key: name for key, name in names.items() if name is not None and name not in EXCHANGEABLE_PARTS[key][0]}

    def conflicts(self) -> Iterator[tuple[str, str]]:
        yield from self._own_part_conflicts()
        yield from self._critic_conflicts()
        if self.compares_samples and self.gamma != 1.0:
            yield (
                "gamma",
                f"{self.gamma:g} has no effect: advantages {self.advantages} gives all actions of an answer the same; set "
                "it to 1",
            )
        if self.old_log_probs == "rollout" and self.importance.level != "none":
            yield (
                "importance.level",
                f"{self.importance.level} has no effect: with old_log_probs rollout the ratio itself is to the policy that "
                "sampled; set it to none",
            )
        if "objective" in self.own_parts and self.dual_clip is not None:
            yield "dual_clip", f"{self.dual_clip:g} has no effect on an objective of your own: set it to null"
        if self.objective in ("clip", "dppo_tv", "dppo_kl") and self.clip_low is None:
            yield "clip_low", f"null, but objective {self.objective} needs a lower bound: set it, such as 0.2"
        if self.objective == "dppo_tv" and self.clip_high >= 1.0:
            yield "clip_high", f"{self.clip_high:g}, but no total variation is above 1: set it below, such as 0.2"
        if self.objective == "dppo_tv" and self.clip_low is not None and self.clip_low >= 1.0:
            yield "clip_low", f"{self.clip_low:g}, but no total variation is above 1: set it below, such as 0.2"
        if self.objective in ("dppo_tv", "dppo_kl") and self.ratio != "token":
            yield "ratio", f"{self.ratio}, but objective {self.objective} looks at single tokens: set it to token"
        if self.objective == "cispo" and self.dual_clip is not None:
            yield "dual_clip", f"{self.dual_clip:g} has no effect: objective cispo bounds every weight; set it to null"
        if self.objective == "cispo" and self.ratio != "token":
            yield "ratio", f"{self.ratio}, but objective cispo weighs each token by its own: set it to token"

    def _own_part_conflicts(self) -> Iterator[tuple[str, str]]:
        for key, name in self.own_parts.items():
            problem = spelling_problem(name, *EXCHANGEABLE_PARTS[key])
            if problem is not None:
                yield key, problem
        parameters = {
            "advantages": self.parameters.advantages,
            "objective": self.parameters.objective,
            "collector": self.parameters.collector,
        }
        for key, values in parameters.items():
            if values and key in self.__dict__ and key not in self.own_parts:
                yield f"parameters.{key}", f"it is for a part of your own: set algorithm.{key} to one, or remove it"
        if self.collector is not None and self.dynamic_sampling:
            yield "dynamic_sampling", f"{self.dynamic_sampling} has no effect: algorithm.collector decides; set it to 0"

    def _critic_conflicts(self) -> Iterator[tuple[str, str]]:
        if "advantages" in self.own_parts:  # whether it reads a critic's values is known when it is made
            return
        if self.has_critic and self.lam is None:
            yield "lam", "null, but advantages gae needs it: set it, such as 0.95"
        if self.has_critic:
            return
        for name, value in (("lam", self.lam), ("value_clip", self.value_clip)):
            if value is not None:
                yield name, f"{value:g} has no effect: advantages {self.advantages} uses no critic; set it to null"
        if self.critic_warmup_steps:
            yield (
                "critic_warmup_steps",
                f"{self.critic_warmup_steps}, but advantages {self.advantages} uses no critic: set it to 0",
            )
