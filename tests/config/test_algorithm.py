"""A name chooses parts, once; parts that make no sense together, or with the other sections, are refused."""

from __future__ import annotations

import pytest
import yaml

from rlhf_ray.config.loading import dump_config, parse_config
from rlhf_ray.config.sections.algorithm import PRESETS, AlgorithmConfig, with_preset

GROUPED = ["critic=null", "batch.samples_per_prompt=4", "reference=null"]
NO_CRITIC = ["critic=null", "reference=null"]
EXPECTED = {
    "ppo": ("gae", "clip", "token", "tokens", "population", "reward", True),
    "grpo": ("group_norm", "clip", "token", "sequences", "none", "loss", True),
    "dr_grpo": ("group_mean", "clip", "token", "constant", "none", "reward", False),
    "rloo": ("leave_one_out", "clip", "trajectory", "sequences", "none", "reward", True),
    "reinforce++": ("reward_to_go", "clip", "token", "tokens", "population", "reward", True),
    "reinforce++_baseline": ("group_mean", "clip", "token", "tokens", "population", "loss", True),
    "gspo": ("group_norm", "clip", "sequence", "sequences", "none", "reward", False),
    "dapo": ("group_norm", "clip", "token", "tokens", "none", "reward", False),
    "cispo": ("group_norm", "cispo", "token", "tokens", "none", "reward", False),
    "distill": ("reward_to_go", "clip", "token", "tokens", "none", "reward", True),
}
"""advantages, objective, ratio, aggregation, whitening, where the KL is, whether there is one."""


def needs_of(name: str) -> list[str]:
    own = {"ppo": [], "reinforce++": NO_CRITIC, "distill": ["critic=null"]}
    return own.get(name, GROUPED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_name_chooses_its_parts_and_the_resolved_config_says_them(texts, name) -> None:
    config = parse_config(texts["ppo"], [f"algorithm.name={name}", *needs_of(name)])
    parts = config.algorithm
    chosen = (parts.advantages, parts.objective, parts.ratio, parts.aggregation, parts.whitening, parts.kl.applied_to)
    assert (*chosen, parts.kl.measure) == EXPECTED[name]
    dumped = dump_config(config)
    assert set(yaml.safe_load(dumped)["algorithm"]) == set(AlgorithmConfig.model_fields)
    assert parse_config(dumped) == config


def test_every_name_is_known() -> None:
    assert set(PRESETS) == set(EXPECTED)
    assert all(AlgorithmConfig(name=name).name == name for name in PRESETS)
    assert AlgorithmConfig() == AlgorithmConfig(**PRESETS["ppo"])


def test_what_is_said_wins_over_what_the_name_chooses_part_by_part(texts) -> None:
    overrides = [
        "algorithm={name: dapo, clip_high: 0.5, shaping: {scale: 2.0, overlong: {penalty: 3.0}}, dynamic_sampling: 0}",
        *GROUPED,
    ]
    parts = parse_config(texts["ppo"], overrides).algorithm
    assert (parts.clip_high, parts.dynamic_sampling, parts.aggregation) == (0.5, 0, "tokens")
    assert (parts.shaping.scale, parts.shaping.overlong.penalty, parts.shaping.overlong.buffer_fraction) == (
        2.0,
        3.0,
        0.2,
    )
    assert with_preset({"name": "dapo", "shaping": {"overlong": None}})["shaping"] == {"overlong": None}
    assert PRESETS["dapo"]["shaping"] == {"overlong": {"buffer_fraction": 0.2, "penalty": 1.0}}


REFUSED = [
    # the algorithm and the other sections
    (["critic=null"],
     "critic: missing: algorithm ppo (advantages gae) learns from a critic's values; add a critic section, or choose an "
     "algorithm without a critic, such as grpo"),
    (["algorithm.name=grpo", "batch.samples_per_prompt=4"],
     "critic: algorithm grpo (advantages group_norm) has no critic: remove the section (critic=null), or set algorithm.name "
     "to ppo"),
    (["algorithm.name=grpo", "critic=null"],
     "batch.samples_per_prompt: 1, but algorithm grpo (advantages group_norm) compares samples of the same prompt: set it to "
     "2 or more"),
    (["algorithm.name=rloo", "critic=null"], "batch.samples_per_prompt: 1, but algorithm rloo (advantages leave_one_out)"),
    (["algorithm.dynamic_sampling=2"],
     "algorithm.dynamic_sampling: 2, but one sample a prompt differs from no other: set it to 0, or "
     "batch.samples_per_prompt to 2 or more"),
    (["algorithm.kl={measure: false, coefficient: 0}"],
     "reference: algorithm.kl.measure is false, so nothing reads it: remove it, or set measure to true"),
    (["algorithm.shaping.overlong={buffer_fraction: 0.01}"],
     "algorithm.shaping.overlong.buffer_fraction: 0.01 of rollout.max_new_tokens 32 is less than one token: raise it"),
    (["algorithm.shaping.too_short={tokens: 33}"],
     "algorithm.shaping.too_short.tokens: 33 is above rollout.max_new_tokens 32: no answer could be long enough"),
    (["algorithm.critic_warmup_steps=3"],
     "algorithm.critic_warmup_steps: 3, but the run has 3 steps, so the policy would never train"),
    (["policy.model.lora={rank: 4, dropout: 0.1}"],
     "policy.model.lora.dropout: 0.1, but the ratio compares the same policy before and after an update: set it to 0"),
    # parts of the algorithm
    (["algorithm.kl={coefficient: 0, target: 6.0}"],
     "algorithm.kl.coefficient: 0 stays 0 under adaptive control (target is set): start it above 0, such as 0.05"),
    (["algorithm.kl.measure=false", "reference=null"],
     "algorithm.kl.coefficient: 0.05 needs a reference, but measure is false: set measure to true, or coefficient to 0"),
    (["algorithm.kl.gradient=plain"],
     "algorithm.kl.gradient: plain has no effect: a penalty in the rewards has no gradient; remove it"),
    (["algorithm.kl={gradient: plain, applied_to: loss}"],
     "algorithm.kl.gradient: plain k1 in the loss pulls nowhere (its gradient is 0 on average): set it to unbiased, or"),
    (["algorithm.importance.high=0.9"],
     "algorithm.importance: low 0 and high 0.9 must have 1, the weight of equal log-probs, between them"),
    (["algorithm.lam=null"], "algorithm.lam: null, but advantages gae needs it: set it, such as 0.95"),
    (["algorithm={name: reinforce++, lam: 0.9}", "critic=null"],
     "algorithm.lam: 0.9 has no effect: advantages reward_to_go uses no critic; set it to null"),
    (["algorithm={name: reinforce++, value_clip: 0.1}", "critic=null"], "algorithm.value_clip: 0.1 has no effect"),
    (["algorithm={name: reinforce++, critic_warmup_steps: 1}", "critic=null"],
     "algorithm.critic_warmup_steps: 1, but advantages reward_to_go uses no critic: set it to 0"),
    (["algorithm={name: grpo, gamma: 0.9}", "critic=null", "batch.samples_per_prompt=4"],
     "algorithm.gamma: 0.9 has no effect: advantages group_norm gives all actions of an answer the same; set it to 1"),
    (["algorithm.clip_low=null"], "algorithm.clip_low: null, but objective clip needs a lower bound: set it, such as 0.2"),
    (["algorithm={objective: cispo, dual_clip: 3}"],
     "algorithm.dual_clip: 3 has no effect: objective cispo bounds every weight; set it to null"),
    (["algorithm={objective: cispo, ratio: sequence}"],
     "algorithm.ratio: sequence, but objective cispo weighs each token by its own: set it to token"),
    (["algorithm={objective: dppo_kl, clip_low: null}"],
     "algorithm.clip_low: null, but objective dppo_kl needs a lower bound: set it, such as 0.2"),
    (["algorithm={objective: dppo_tv, clip_high: 1}"],
     "algorithm.clip_high: 1, but no total variation is above 1: set it below, such as 0.2"),
    (["algorithm={objective: dppo_tv, clip_low: 1}"],
     "algorithm.clip_low: 1, but no total variation is above 1: set it below, such as 0.2"),
    (["algorithm={objective: dppo_tv, ratio: trajectory}"],
     "algorithm.ratio: trajectory, but objective dppo_tv looks at single tokens: set it to token"),
    (["algorithm.dual_clip=1.0"], "algorithm.dual_clip: 1.0 is not a number above 1 or null"),
    (["algorithm.importance={gating: tv, level: none}"],
     "algorithm.importance.gating: tv has no effect, since level is none: set level to token or sequence"),
    (["algorithm.importance={gating: tv, high: 0.1}"],
     "algorithm.importance.rule: truncate, but gating tv drops what is outside of the bounds: set it to mask"),
    (["algorithm.importance={gating: tv, rule: mask}"],
     "algorithm.importance.high: 2, but no total variation is above 1: set it below, such as 0.1"),
    (["algorithm.importance={gating: binary_kl, rule: mask}"],
     "algorithm.importance.high: 2 is the default for ratios: set it in nats for gating binary_kl, such as 0.05"),
    (["algorithm.importance={gating: binary_kl, rule: mask, low: 0.01, high: 0.1}"],
     "algorithm.importance.low: 0.01, but a divergence (gating binary_kl) is bounded from above: set it to 0"),
    (["algorithm.importance={gating: geometric_mean, rule: mask, low: 0.5, high: 2}"],
     "algorithm.importance.level: token, but gating geometric_mean is of a whole answer: set it to sequence, or gating to "
     "ratio"),
    (["algorithm.old_log_probs=rollout"],
     "algorithm.importance.level: token has no effect: with old_log_probs rollout the ratio itself is to the policy that "
     "sampled; set it to none"),
    (["algorithm.objective=gae"], "algorithm.objective: 'gae' is not one of package.module:name, path.py:name, clip, cispo"),
    (["algorithm.collector=clip"], "algorithm.collector: 'clip' is not one of package.module:name, path.py:name, nor an"),
    (["algorithm.advantages=1"], "algorithm.advantages: 1 is not gae, reward_to_go, leave_one_out, group_mean, group_norm, or"),
    (["algorithm.name=trpo"], "algorithm.name: 'trpo' is not ppo, grpo, dr_grpo, rloo, reinforce++"),
    (["algorithm.name=[grpo]"], "algorithm.name: [grpo] is not ppo, grpo"),
    (["algorithm.shaping.missing_eos={rule: drop, value: 1}"],
     "algorithm.shaping.missing_eos.rule: 'drop' is not subtract, replace or scale"),
]  # fmt: skip


@pytest.mark.parametrize(("overrides", "message"), REFUSED)
def test_parts_that_make_no_sense_are_refused_with_the_way_out(problems, overrides, message) -> None:
    reported = problems("ppo", *overrides)
    assert len(reported) == 1, reported
    assert message in reported[0]


def test_problems_elsewhere_do_not_hide_what_the_name_chose(problems) -> None:
    """A config with another error is checked with the parts that would run, not with those of ppo."""
    reported = problems("ppo", "algorithm.name=grpo", *GROUPED, "run.seed=x")
    assert len(reported) == 1 and "run.seed" in reported[0]


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.kl={gradient: plain, applied_to: loss, estimator: k3}"],
        ["algorithm.critic_warmup_steps=2"],
        ["algorithm.kl={measure: false, coefficient: 0}", "reference=null"],
        ["algorithm={name: grpo, kl: {target: 6.0}}", "critic=null", "batch.samples_per_prompt=2"],
        ["algorithm.shaping={too_short: {tokens: 32}, overlong: {buffer_fraction: 0.03}}"],
        ["algorithm={objective: cispo, clip_low: null}"],
        ["batch.samples_per_prompt=2", "algorithm.dynamic_sampling=1"],
    ],
)
def test_what_is_at_the_edge_but_right_is_accepted(problems, overrides) -> None:
    assert problems("ppo", *overrides) == []
