"""OpenRLHF's flag names, so that an unknown key can be answered with the key that it is called here.

Invariant: every key named here exists in some job. ``ROLE`` stands for each role of a job, ``a|b`` for the first of the
two that the job has. Names are the last part of a flag in any generation of OpenRLHF: ``--init_kl_coef``,
``--algo.kl.init_coef``.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

ALWAYS_PACKED = "sequences are always packed: remove it"
FORWARD = "passes without gradients take batch.forward_factor times as much"

FLAGS: dict[str, tuple[tuple[str, ...], str]] = {
    # models
    "pretrain": (("policy.model.path|reward.model.path",), ""),
    "model_name_or_path": (("ROLE.model.path",), ""),
    "reward_pretrain": (("reward.model.path",), "several models are terms of reward.mixture"),
    "critic_pretrain": (("critic.model.path",), ""),
    "remote_rm_url": (("reward.url",), "reward.function can call a server of another kind"),
    "bf16": (("ROLE.model.dtype",), ""),
    "param_dtype": (("ROLE.model.dtype",), ""),
    "attn_implementation": (("ROLE.model.attention",), ""),
    "flash_attn": (("ROLE.model.attention",), ""),
    "load_in_4bit": (("ROLE.model.quantization",), "its value is nf4"),
    "lora_rank": (("ROLE.model.lora.rank",), ""),
    "lora_alpha": (("ROLE.model.lora.alpha",), ""),
    "lora_dropout": (("ROLE.model.lora.dropout",), ""),
    "target_modules": (("ROLE.model.lora.targets",), ""),
    "init_value_head": (("ROLE.model.head_init",), ""),
    "packing_samples": ((), ALWAYS_PACKED),
    # engine
    "zero_stage": (("ROLE.engine.zero",), ""),
    "adam_offload": (("ROLE.engine.offload",), "its value is optimizer"),
    "actor_learning_rate": (("policy.engine.optimizer.learning_rate",), ""),
    "critic_learning_rate": (("critic.engine.optimizer.learning_rate",), ""),
    "lr": (("ROLE.engine.optimizer.learning_rate",), ""),
    "adam": (("ROLE.engine.optimizer",), ""),
    "adam_betas": (("ROLE.engine.optimizer.betas",), ""),
    "l2": (("ROLE.engine.optimizer.weight_decay",), ""),
    "lr_warmup_ratio": (("ROLE.engine.optimizer.warmup_fraction",), ""),
    "lr_scheduler": (("ROLE.engine.optimizer.schedule",), ""),
    "max_norm": (("ROLE.engine.optimizer.max_grad_norm",), ""),
    # placement
    "actor": (("policy",), ""),
    "ref": (("reference",), ""),
    "actor_num_nodes": (("policy.ranks",), "ranks counts nodes x GPUs"),
    "actor_num_gpus_per_node": (("policy.ranks",), "ranks counts nodes x GPUs"),
    "critic_num_nodes": (("critic.ranks",), "ranks counts nodes x GPUs"),
    "critic_num_gpus_per_node": (("critic.ranks",), "ranks counts nodes x GPUs"),
    "reward_num_nodes": (("reward.ranks",), "ranks counts nodes x GPUs"),
    "reward_num_gpus_per_node": (("reward.ranks",), "ranks counts nodes x GPUs"),
    "ref_num_nodes": (("reference.ranks",), "ranks counts nodes x GPUs"),
    "ref_num_gpus_per_node": (("reference.ranks",), "ranks counts nodes x GPUs"),
    "colocate_all_models": (("ROLE.resources.gpus_per_rank",), "roles share a GPU when each takes a part of it"),
    "colocate_actor_ref": (("ROLE.resources.gpus_per_rank",), "roles share a GPU when each takes a part of it"),
    "colocate_critic_reward": (("ROLE.resources.gpus_per_rank",), "roles share a GPU when each takes a part of it"),
    "vllm_num_engines": (("rollout.engines",), ""),
    "vllm_tensor_parallel_size": (("rollout.tensor_parallel",), ""),
    "vllm_gpu_memory_utilization": (("rollout.gpu_memory_utilization",), ""),
    # sizes
    "rollout_batch_size": (("batch.prompts_per_step",), ""),
    "n_samples_per_prompt": (("batch.samples_per_prompt",), ""),
    "train_batch_size": (("batch.sequences_per_update|batch.pairs_per_update",), ""),
    "micro_train_batch_size": (("batch.max_tokens_per_micro_batch",), "counted in tokens"),
    "micro_rollout_batch_size": (("batch.max_tokens_per_micro_batch",), FORWARD),
    "train_max_tokens_per_gpu": (("batch.max_tokens_per_micro_batch",), ""),
    "rollout_max_tokens_per_gpu": (("batch.max_tokens_per_micro_batch",), FORWARD),
    "max_epochs": (("batch.passes_per_step|epochs",), ""),
    "num_episodes": (("steps",), "counted in steps of batch.prompts_per_step prompts"),
    "max_len": (("data.max_tokens",), ""),
    "prompt_max_len": (("data.max_prompt_tokens",), ""),
    "generate_max_len": (("rollout.max_new_tokens",), ""),
    # data
    "prompt_data": (("data.path",), ""),
    "dataset": (("data.path",), "several files are data.sources"),
    "dataset_probs": (("data.sources",), "each with a weight: how many times an epoch goes through its rows"),
    "prompt_data_probs": (("data.sources",), "each with a weight: how many times an epoch goes through its rows"),
    "apply_chat_template": (("data.apply_chat_template",), ""),
    "chosen_key": (("data.chosen_key",), ""),
    "rejected_key": (("data.rejected_key",), ""),
    "eval_dataset": (("data.evaluation_path",), ""),
    "input_key": (("data.prompt_key",), ""),
    "output_key": (("data.answer_key",), ""),
    "max_samples": (("data.max_rows",), ""),
    # algorithm
    "advantage_estimator": (
        ("algorithm.name",),
        "reinforce is reinforce++, reinforce_baseline is reinforce++_baseline, group_norm is grpo, gae is ppo",
    ),
    "policy_loss_type": (("algorithm.name",), "gspo is a name of its own"),
    "dual_clip": (("algorithm.dual_clip",), ""),
    "value_clip": (("algorithm.value_clip",), ""),
    "use_kl_loss": (("algorithm.kl.applied_to",), "its value is loss"),
    "no_advantage_std_norm": (("algorithm.whitening",), ""),
    "overlong_buffer_len": (("algorithm.shaping.overlong.buffer_fraction",), "a part of rollout.max_new_tokens"),
    "overlong_penalty_factor": (("algorithm.shaping.overlong.penalty",), ""),
    "stop_properly_penalty_coef": (("algorithm.shaping.missing_eos",), "rule scale, or replace where it is negative"),
    "is_correction_level": (("algorithm.importance.level",), "seq is sequence, off is none"),
    "is_correction_mode": (("algorithm.importance.rule",), "clip is truncate"),
    "is_correction_threshold": (("algorithm.importance.low", "algorithm.importance.high"), ""),
    "dynamic_filtering": (("algorithm.dynamic_sampling",), "how often further prompts are sampled"),
    "init_kl_coef": (("algorithm.kl.coefficient",), ""),
    "init_coef": (("algorithm.kl.coefficient",), ""),
    "kl_target": (("algorithm.kl.target",), ""),
    "kl_horizon": (("algorithm.kl.horizon",), ""),
    "kl_estimator": (("algorithm.kl.estimator",), ""),
    "lambd": (("algorithm.lam",), ""),
    "eps_clip": (("algorithm.clip_low", "algorithm.clip_high"), ""),
    "eps_clip_low_high": (("algorithm.clip_low", "algorithm.clip_high"), ""),
    "entropy_loss_coef": (("algorithm.entropy_coefficient",), ""),
    "entropy_coef": (("algorithm.entropy_coefficient",), ""),
    "freezing_actor_steps": (("algorithm.critic_warmup_steps",), ""),
    "normalize_reward": (("reward.normalize|normalize",), ""),
    "reward_clip_range": (("algorithm.shaping.clip",), "one number c clips to [-c, c]"),
    # the run
    "save_path": (("run.root", "run.name"), "the result is written to root/name/final"),
    "ckpt_path": (("run.root", "run.name"), "checkpoints are written to root/name/checkpoints"),
    "save_steps": (("checkpoint.every_steps",), ""),
    "max_ckpt_num": (("checkpoint.keep",), ""),
    "load_checkpoint": ((), "a run goes on with `rlhf-ray resume RUN_DIR`"),
    "eval_steps": (("evaluation.every_steps",), ""),
    "eval_n_samples_per_prompt": (("evaluation.samples_per_prompt",), ""),
    "eval_temperature": (("evaluation.greedy",), "true for temperature 0; else rollout.temperature holds"),
    "use_tensorboard": (("monitoring.tensorboard",), ""),
}


def hint(key: str, before: str = "", known: Collection[str] | None = None, role: str | None = None) -> str:
    """A sentence that names the key for OpenRLHF's ``key``, after ``before``; empty for an unknown name.

    ``known`` are the keys of the job at hand (none: of any job); the sentence is empty too where none of them fits.
    ``role`` is the role in whose section the key stands.
    """
    name = key.rpartition(".")[2].replace("-", "_")
    if name not in FLAGS:
        return ""
    targets, note = FLAGS[name]
    places = list(_places(targets, known, role))
    if places:
        return f"{before}OpenRLHF's {name} is {' and '.join(places)} here" + (f" ({note})" if note else "")
    return f"{before}{note}" if note and not targets else ""


def _places(targets: Collection[str], known: Collection[str] | None, role: str | None) -> Iterator[str]:
    for target in targets:
        if known is None:
            yield target.replace("|", " or ")
        elif not target.startswith("ROLE."):
            yield from [key for key in target.split("|") if key in known][:1]
        elif role is not None and target.replace("ROLE", role) in known:
            yield target.replace("ROLE", role)
        else:
            tail = target.removeprefix("ROLE")
            same = [key for key in known if key.count(".") == target.count(".") and key.endswith(tail)]
            yield from [" or ".join(same)] if same else []
