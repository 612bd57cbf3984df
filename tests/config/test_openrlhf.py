"""Who comes from OpenRLHF is told where each flag stands; every key that a hint names exists."""

from __future__ import annotations

import pytest

from rlhf_ray.config.jobs.registry import job_classes
from rlhf_ray.config.keys import keys_of, roles_of
from rlhf_ray.config.openrlhf import FLAGS, hint

ALL_KEYS = {key for job in job_classes().values() for key in keys_of(job)}
ALL_ROLES = {role for job in job_classes().values() for role in roles_of(job)}


def test_every_key_that_a_hint_names_exists():
    named = {key for targets, _ in FLAGS.values() for target in targets for key in target.split("|")}
    for target in named:
        assert any(target.replace("ROLE", role) in ALL_KEYS for role in ALL_ROLES), target


def test_every_flag_says_something():
    for flag in FLAGS:
        assert hint(flag)


@pytest.mark.parametrize(
    ("kind", "override", "message"),
    [
        ("ppo", "n_samples_per_prompt=4", "OpenRLHF's n_samples_per_prompt is batch.samples_per_prompt here"),
        ("ppo", "rollout.rollout_batch_size=4", "OpenRLHF's rollout_batch_size is batch.prompts_per_step here"),
        ("ppo", "batch.micro_train_batch_size=4", "is batch.max_tokens_per_micro_batch here (counted in tokens)"),
        ("ppo", "critic.zero_stage=2", "OpenRLHF's zero_stage is critic.engine.zero here"),
        ("ppo", "zero_stage=2", "is policy.engine.zero or critic.engine.zero or reference.engine.zero or reward.engine.zero"),
        ("ppo", "init_kl_coef=0.1", "OpenRLHF's init_kl_coef is algorithm.kl.coefficient here"),
        ("ppo", "pretrain=x", "OpenRLHF's pretrain is policy.model.path here"),
        ("rm", "pretrain=x", "OpenRLHF's pretrain is reward.model.path here"),
        ("ppo", "reward_pretrain=x", "OpenRLHF's reward_pretrain is reward.model.path here"),
        ("ppo", "actor_num_gpus_per_node=8", "is policy.ranks here (ranks counts nodes x GPUs)"),
        ("ppo", "eps_clip=0.2", "is algorithm.clip_low and algorithm.clip_high here"),
        ("rm", "train_batch_size=8", "OpenRLHF's train_batch_size is batch.pairs_per_update here"),
        ("sft", "train_batch_size=8", "OpenRLHF's train_batch_size is batch.sequences_per_update here"),
        ("rm", "packing_samples=true", "sequences are always packed: remove it"),
        ("ppo", "actor.num_nodes=1", "OpenRLHF's actor is policy here"),
    ],
)  # fmt: skip
def test_an_old_flag_is_named_where_it_stands_here(problems, kind, override, message):
    reported = problems(kind, override)
    assert len(reported) == 1
    assert message in reported[0]


def test_a_flag_without_a_place_in_this_job_is_no_hint(problems):
    assert "OpenRLHF" not in problems("rm", "n_samples_per_prompt=4")[0]
