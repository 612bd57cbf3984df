"""Rules between the ``algorithm`` section and the sections that it needs.

Invariant: every problem names the key, its value and the way out.
"""

from __future__ import annotations

from collections.abc import Iterator

from rlhf_ray.config.problems import Problem
from rlhf_ray.config.sections.algorithm import AlgorithmConfig, ShapingConfig
from rlhf_ray.config.sections.rewards import RewardConfig
from rlhf_ray.config.sections.roles import RoleConfig


def critic_where_needed(algorithm: AlgorithmConfig, critic: RoleConfig | None) -> Iterator[Problem]:
    """There is a critic exactly where the advantages come from values."""
    name, advantages = algorithm.name, algorithm.advantages
    if "advantages" in algorithm.own_parts:  # whether it reads values is known when it is made
        return
    if algorithm.has_critic and critic is None:
        yield (
            "critic",
            f"missing: algorithm {name} (advantages {advantages}) learns from a critic's values; add a critic section, or "
            "choose an algorithm without a critic, such as grpo",
        )
    if not algorithm.has_critic and critic is not None:
        yield (
            "critic",
            f"algorithm {name} (advantages {advantages}) has no critic: remove the section (critic=null), or set "
            "algorithm.name to ppo",
        )


def samples_to_compare(algorithm: AlgorithmConfig, samples_per_prompt: int) -> Iterator[Problem]:
    """An algorithm that compares answers to one prompt needs two or more of them."""
    if samples_per_prompt > 1:
        return
    if algorithm.compares_samples:
        yield (
            "batch.samples_per_prompt",
            f"{samples_per_prompt}, but algorithm {algorithm.name} (advantages {algorithm.advantages}) compares samples of "
            "the same prompt: set it to 2 or more",
        )
    elif algorithm.dynamic_sampling:
        yield (
            "algorithm.dynamic_sampling",
            f"{algorithm.dynamic_sampling}, but one sample a prompt differs from no other: set it to 0, or "
            "batch.samples_per_prompt to 2 or more",
        )


def judges_compare_groups(reward: RewardConfig, key: str, samples: int) -> Iterator[Problem]:
    """A judge that compares the answers to a prompt has some to compare; ``samples`` is their number, set at ``key``."""
    for place, source in reward.sources.items():
        compare = None if source.judge is None else source.judge.compare
        if compare is not None and samples < 2:
            yield key, f"{samples}, but {place}.judge.compare compares the answers to a prompt: set it to 2 or more"
        elif compare == "pairs" and samples % 2:
            yield (
                key,
                f"{samples} answers to a prompt do not make pairs, which {place}.judge.compare asks for: set an even number",
            )


def reference_is_used(algorithm: AlgorithmConfig, reference: RoleConfig | None) -> Iterator[Problem]:
    """A reference is loaded only to measure the KL."""
    if reference is not None and not algorithm.kl.measure:
        yield "reference", "algorithm.kl.measure is false, so nothing reads it: remove it, or set measure to true"


def teacher_is_named(algorithm: AlgorithmConfig, reference: RoleConfig | None) -> Iterator[Problem]:
    """Distillation has a teacher, which stands in the place of the reference."""
    if algorithm.name == "distill" and reference is None:
        yield (
            "reference",
            "missing: algorithm distill draws the policy to the reference, which is the teacher; set reference.model.path",
        )


def penalties_fit(shaping: ShapingConfig, max_new_tokens: int) -> Iterator[Problem]:
    """Penalties on the length of an answer lie within the lengths that it can have."""
    if shaping.overlong is not None and round(shaping.overlong.buffer_fraction * max_new_tokens) < 1:
        yield (
            "algorithm.shaping.overlong.buffer_fraction",
            f"{shaping.overlong.buffer_fraction:g} of rollout.max_new_tokens {max_new_tokens} is less than one token: raise it",
        )
    if shaping.too_short is not None and shaping.too_short.tokens > max_new_tokens:
        yield (
            "algorithm.shaping.too_short.tokens",
            f"{shaping.too_short.tokens} is above rollout.max_new_tokens {max_new_tokens}: no answer could be long enough",
        )


def policy_computes_the_same_twice(policy: RoleConfig) -> Iterator[Problem]:
    """Dropout is off, because it would change the ratio of probabilities before and after an update."""
    lora = policy.model.lora
    if lora is not None and lora.dropout > 0.0:
        yield (
            "policy.model.lora.dropout",
            f"{lora.dropout:g}, but the ratio compares the same policy before and after an update: set it to 0",
        )


def policy_trains_at_all(algorithm: AlgorithmConfig, steps: int) -> Iterator[Problem]:
    """The steps in which only the critic trains leave some for the policy."""
    warmup = algorithm.critic_warmup_steps
    if warmup >= steps:
        yield (
            "algorithm.critic_warmup_steps",
            f"{warmup}, but the run has {steps} steps, so the policy would never train: lower it or raise steps",
        )
