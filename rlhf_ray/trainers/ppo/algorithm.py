"""Build an algorithm's functions from its config section.

Invariant: only this module reads which parts the ``algorithm`` section names. The code that calls the functions never asks
which algorithm runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, get_args

from rlhf_ray.algorithms.advantages import AgainstGroup, Estimator, Gae, RewardToGo
from rlhf_ray.algorithms.group_baselines import Baseline
from rlhf_ray.algorithms.importance import ImportanceCorrection
from rlhf_ray.algorithms.losses import ValueLoss
from rlhf_ray.algorithms.policy_loss import Cispo, Clipped, Dppo, KlTerm, Objective, PolicyLoss
from rlhf_ray.algorithms.preparation import Preparation
from rlhf_ray.algorithms.shaping import MissingEos, Overlong, RewardShaping, TooShort
from rlhf_ray.algorithms.user_parts import make_user_estimator, make_user_objective
from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.config.sections.algorithm import AlgorithmConfig, ShapingConfig

BASELINES: Mapping[str, Baseline] = {name: name for name in get_args(Baseline)}
"""The baselines by the words for them in a config, which are the same."""
DIVERGENCES: Mapping[str, Literal["tv", "binary_kl"]] = {"dppo_tv": "tv", "dppo_kl": "binary_kl"}
"""What the objectives of DPPO bound."""
ALWAYS_THERE = (
    "token_ids", "action_mask", "weight_version", "rollout_log_probs", "log_probs", "prompt_id", "sample_index",
    "finish_reason", "score",
)  # fmt: skip
"""Columns that every batch has when advantages are estimated."""


def make_preparation(config: PpoConfig) -> Preparation:
    """The step from rewards to advantages: what is done to a scored batch before its updates."""
    algorithm, importance = config.algorithm, config.algorithm.importance
    in_rewards = algorithm.kl.applied_to == "reward" and algorithm.kl.measure
    return Preparation(
        shaping=_shaping(algorithm.shaping, config.rollout.max_new_tokens),
        estimator=make_estimator(config),
        importance=None
        if algorithm.old_log_probs == "rollout"
        else ImportanceCorrection(
            importance.level, importance.rule, importance.low, importance.high, importance.gating
        ),
        kl_penalty=algorithm.kl.estimator if in_rewards else None,
        placement=algorithm.shaping.placement,
        whiten_rewards=algorithm.shaping.whitening,
        whiten_advantages=algorithm.whitening,
        leave_out_truncated=algorithm.mask_truncated,
    )


def make_policy_loss(config: PpoConfig) -> PolicyLoss:
    """The policy's loss, with the KL coefficient that the run starts with."""
    algorithm, kl = config.algorithm, config.algorithm.kl
    in_loss = kl.applied_to == "loss" and kl.measure
    return PolicyLoss(
        make_objective(algorithm),
        ratio=algorithm.ratio,
        aggregation=algorithm.aggregation,
        constant_tokens=config.rollout.max_new_tokens,
        entropy_coefficient=algorithm.entropy_coefficient,
        kl=KlTerm(kl.coefficient, kl.estimator, kl.gradient) if in_loss else None,
    )


def make_value_loss(config: PpoConfig) -> ValueLoss:
    """The critic's loss; a run without a critic does not call it."""
    return ValueLoss(clip=config.algorithm.value_clip)


def make_objective(algorithm: AlgorithmConfig) -> Objective:
    """The policy objective, which may be the user's own."""
    if "objective" in algorithm.own_parts:
        return make_user_objective(algorithm.objective, algorithm.parameters.objective)
    if algorithm.objective == "cispo":
        return Cispo(algorithm.clip_low, algorithm.clip_high)
    assert algorithm.clip_low is not None
    if algorithm.objective in DIVERGENCES:
        kind = DIVERGENCES[algorithm.objective]
        return Dppo(kind, algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip)
    return Clipped(algorithm.clip_low, algorithm.clip_high, algorithm.dual_clip)


def make_estimator(config: PpoConfig) -> Estimator:
    """The advantage estimator, which may be the user's own."""
    algorithm, has_critic = config.algorithm, config.critic is not None
    if "advantages" in algorithm.own_parts:
        columns = {
            *ALWAYS_THERE,
            *(["values"] if has_critic else []),
            *(["reference_log_probs"] if algorithm.kl.measure else []),
        }
        return make_user_estimator(
            algorithm.advantages, algorithm.parameters.advantages, columns=columns, has_critic=has_critic
        )
    if algorithm.advantages == "gae":
        assert algorithm.lam is not None
        return Gae(algorithm.gamma, algorithm.lam)
    if algorithm.advantages == "reward_to_go":
        return RewardToGo(algorithm.gamma)
    return AgainstGroup(BASELINES[algorithm.advantages])


def _shaping(shaping: ShapingConfig, max_new_tokens: int) -> RewardShaping:
    overlong, too_short, missing = shaping.overlong, shaping.too_short, shaping.missing_eos
    return RewardShaping(
        normalize=shaping.normalize,
        scale=shaping.scale,
        clip=shaping.clip,
        overlong=Overlong(max_new_tokens, round(overlong.buffer_fraction * max_new_tokens), overlong.penalty)
        if overlong
        else None,
        too_short=TooShort(too_short.tokens, too_short.penalty) if too_short else None,
        missing_eos=MissingEos(missing.rule, missing.value) if missing else None,
    )
