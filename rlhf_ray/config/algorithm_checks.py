"""What an algorithm asks of the other sections of a PPO job.

Always true: as in :mod:`rlhf_ray.config.checks`, every problem names the key, its value and the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rlhf_ray.config.schema import PpoConfig
from rlhf_ray.config.validation import Problem


def _critic_where_needed(config: PpoConfig) -> Iterator[Problem]:
    name, advantages = config.algorithm.name, config.algorithm.advantages
    if config.algorithm.has_critic and config.critic is None:
        yield (
            "critic",
            f"missing: algorithm {name} (advantages {advantages}) learns from a critic's values; add a critic section, or "
            "choose an algorithm without a critic, such as grpo",
        )
    if not config.algorithm.has_critic and config.critic is not None:
        yield (
            "critic",
            f"algorithm {name} (advantages {advantages}) has no critic: remove the section (critic=null), or set "
            "algorithm.name to ppo",
        )


def _samples_to_compare(config: PpoConfig) -> Iterator[Problem]:
    algorithm, samples = config.algorithm, config.batch.samples_per_prompt
    if samples > 1:
        return
    if algorithm.compares_samples:
        yield (
            "batch.samples_per_prompt",
            f"{samples}, but algorithm {algorithm.name} (advantages {algorithm.advantages}) compares samples of the same "
            "prompt: set it to 2 or more",
        )
    elif algorithm.dynamic_sampling:
        yield (
            "algorithm.dynamic_sampling",
            f"{algorithm.dynamic_sampling}, but one sample a prompt differs from no other: set it to 0, or "
            "batch.samples_per_prompt to 2 or more",
        )


def _reference_is_used(config: PpoConfig) -> Iterator[Problem]:
    if config.reference is not None and not config.algorithm.kl.measure:
        yield "reference", "algorithm.kl.measure is false, so nothing reads it: remove it, or set measure to true"


def _penalties_fit(config: PpoConfig) -> Iterator[Problem]:
    longest, shaping = config.rollout.max_new_tokens, config.algorithm.shaping
    if shaping.overlong is not None and round(shaping.overlong.buffer_fraction * longest) < 1:
        yield (
            "algorithm.shaping.overlong.buffer_fraction",
            f"{shaping.overlong.buffer_fraction:g} of rollout.max_new_tokens {longest} is no token: raise it",
        )
    if shaping.too_short is not None and shaping.too_short.tokens > longest:
        yield (
            "algorithm.shaping.too_short.tokens",
            f"{shaping.too_short.tokens} is above rollout.max_new_tokens {longest}: no answer could be long enough",
        )


def _policy_is_the_same_twice(config: PpoConfig) -> Iterator[Problem]:
    lora = config.policy.model.lora
    if lora is not None and lora.dropout > 0.0:
        yield (
            "policy.model.lora.dropout",
            f"{lora.dropout:g}, but the ratio compares the same policy before and after an update: set it to 0",
        )


def _policy_learns(config: PpoConfig) -> Iterator[Problem]:
    warmup = config.algorithm.critic_warmup_steps
    if warmup >= config.steps:
        yield (
            "algorithm.critic_warmup_steps",
            f"{warmup}, but the run has {config.steps} steps, so the policy would never train: lower it or raise steps",
        )


ALGORITHM_RULES: tuple[Callable[[PpoConfig], Iterator[Problem]], ...] = (
    _critic_where_needed,
    _samples_to_compare,
    _reference_is_used,
    _penalties_fit,
    _policy_is_the_same_twice,
    _policy_learns,
)
