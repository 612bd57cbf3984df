"""Every flag of OpenRLHF 0.11.2 (``train_ppo_ray``, ``train_rm``, ``train_sft``, ``train_dpo``, ``serve_rm``), and the flat
names that older versions gave them, each with the keys that it is called here or the reason why it has none.

Invariants: a flag stands here under its whole name; every key that is named exists in some job. ``ROLE`` stands for each role
of a job, ``a|b`` for the first of the two that the job has.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple


class Answer(NamedTuple):
    """What is said to a flag."""

    keys: tuple[str, ...]
    """What it is called here; nothing where it has no counterpart."""
    note: str = ""
    """How its values differ from those of the keys; or why it has no counterpart."""


def _ours(*keys: str, note: str = "") -> Answer:
    return Answer(keys, note)


def _none(reason: str) -> Answer:
    return Answer((), reason)


MICRO_BATCH = "batch.max_tokens_per_micro_batch"
RANKS = "ranks counts nodes x GPUs"
SHARED = "roles share a GPU when each takes a part of it"
BY_TURNS = "all roles on the same GPUs, each awake in its turn"
FORWARD = "passes without gradients take batch.forward_factor times as much"
FORWARD_OF_SEQUENCES = f"counted in tokens; {FORWARD}"
TRANSPORT = "by default NCCL or CUDA IPC where the placement allows it, else Ray's object store"
DIRECTORY = "all that a run writes lies in root/name"
ALL_OFFLOADED = "its value is all, with engine.zero at 3"
NO_AVERAGE = "no moving average of the weights is kept"
NO_MUON = "the optimizer is AdamW"
NO_SEQUENCE_PARALLELISM = "a sequence lies on one rank"
NO_IMAGES = "models read text alone"
TENSORBOARD = "[tensorboard], in the run directory, or [tensorboard:DIRECTORY]"
WANDB_KEY = "[wandb]; the key itself is read from WANDB_API_KEY, or from what `wandb login` keeps"
NO_LIKELIHOOD = "the loss of pairs has no term of the likelihood"
NEVER = "-1 (never) is 0"
WEIGHTS = "a weight says how many times an epoch goes through the rows"

_OPTIMIZER: Mapping[str, tuple[str, str]] = {
    "adam.lr": ("learning_rate", ""),
    "adam.betas": ("betas", "a list"),
    "adam.eps": ("eps", ""),
    "adam.weight_decay": ("weight_decay", ""),
    "lr_scheduler": ("schedule", "cosine_with_min_lr is cosine, with final_fraction above 0"),
    "lr_warmup_ratio": ("warmup_fraction", ""),
    "min_lr_ratio": ("final_fraction", ""),
    "max_norm": ("max_grad_norm", ""),
}


def _optimizer_of(prefix: str, role: str) -> dict[str, Answer]:
    answers = {
        f"{prefix}{name}": _ours(f"{role}.engine.optimizer.{key}", note=note)
        for name, (key, note) in _OPTIMIZER.items()
    }
    muon = ("optim", "muon.lr", "muon.momentum", "muon.ns_steps", "muon.nesterov", "muon.no_nesterov")
    return answers | {f"{prefix}{name}": _none(NO_MUON) for name in muon}


_MODELS: dict[str, Answer] = {
    "actor.model_name_or_path": _ours("policy.model.path"),
    "critic.model_name_or_path": _ours("critic.model.path"),
    "ref.model_name_or_path": _ours("reference.model.path"),
    "reward.model_name_or_path": _ours("reward.model.path", note="several models are terms of reward.mixture"),
    "model.model_name_or_path": _ours("policy.model.path|reward.model.path"),
    "reward.remote_url": _ours("reward.url", note="several are terms of reward.mixture, a .py file is reward.function"),
    "actor.gradient_checkpointing_enable": _ours("policy.model.gradient_checkpointing"),
    "model.gradient_checkpointing_enable": _ours("policy.model.gradient_checkpointing|reward.model.gradient_checkpointing"),
    "actor.gradient_checkpointing_reentrant": _none("gradient checkpointing is never reentrant"),
    "model.gradient_checkpointing_reentrant": _none("gradient checkpointing is never reentrant"),
    "actor.freeze_visual_encoder": _none(NO_IMAGES),
    "ds.param_dtype": _ours("ROLE.model.dtype"),
    "ds.attn_implementation": _ours("ROLE.model.attention"),
    "ds.experts_implementation": _none("transformers chooses how experts are computed"),
    "ds.use_liger_kernel": _none("a job uses none of Liger's kernels; Actor(..., use_liger_kernel=True) does in Python"),
    "ds.load_in_4bit": _ours("ROLE.model.quantization", note="its value is nf4"),
    "ds.lora.rank": _ours("ROLE.model.lora.rank", note="0 is no lora section"),
    "ds.lora.alpha": _ours("ROLE.model.lora.alpha"),
    "ds.lora.dropout": _ours("ROLE.model.lora.dropout"),
    "ds.lora.target_modules": _ours("ROLE.model.lora.targets", note="all-linear, or a list"),
    "ds.value_head_prefix": _ours("ROLE.model.value_head_prefix"),
    "ds.packing_samples": _none("sequences are always packed"),
    "ds.ring_attn_size": _none(NO_SEQUENCE_PARALLELISM),
    "ds.ring_attn_head_stride": _none(NO_SEQUENCE_PARALLELISM),
}  # fmt: skip

_ENGINE: dict[str, Answer] = {
    "ds.zero_stage": _ours("ROLE.engine.zero"),
    "ds.adam_offload": _ours("ROLE.engine.offload", note="its value is optimizer"),
    "ref.offload": _ours("reference.engine.offload", note=ALL_OFFLOADED),
    "reward.offload": _ours("reward.engine.offload", note=ALL_OFFLOADED),
    "ds.zpg": _none("ZeRO shards over all ranks of a role"),
    "ds.grad_accum_dtype": _none("gradients are added up in fp32"),
    "ds.overlap_comm": _none("off at ZeRO 1 and 2, DeepSpeed's own setting at 3"),
    "ds.deepcompile": _none("models are not compiled"),
    "ds.tensor_parallel_size": _none("training shards by ZeRO alone (engine.zero); rollout.tensor_parallel is for engines"),
    "ds.enable_sleep": _ours("cluster.colocate", note=BY_TURNS),
    "ds.use_universal_ckpt": _none("a run resumes with any number of ranks (resume RUN policy.ranks=N)"),
    "local_rank": _none("Ray places the ranks"),
    **_optimizer_of("actor.", "policy"),
    **_optimizer_of("critic.", "critic"),
    **_optimizer_of("", "ROLE"),
}  # fmt: skip

_PLACEMENT: dict[str, Answer] = {
    **{f"{flag}.{name}": _ours(f"{role}.ranks", note=RANKS)
       for flag, role in (("actor", "policy"), ("critic", "critic"), ("ref", "reference"), ("reward", "reward"))
       for name in ("num_nodes", "num_gpus_per_node")},
    "train.colocate_actor_ref": _ours(
        "policy.resources.gpus_per_rank", "reference.resources.gpus_per_rank", note=SHARED),
    "train.colocate_critic_reward": _ours(
        "critic.resources.gpus_per_rank", "reward.resources.gpus_per_rank", note=SHARED),
    "train.colocate_all": _ours("cluster.colocate", note=BY_TURNS),
    "vllm.num_engines": _ours("rollout.engines"),
    "vllm.tensor_parallel_size": _ours("rollout.tensor_parallel"),
    "vllm.gpu_memory_utilization": _ours("rollout.gpu_memory_utilization"),
    "vllm.sync_backend": _ours("rollout.weight_transport", note=TRANSPORT),
    "vllm.sync_with_ray": _ours("rollout.weight_transport", note=TRANSPORT),
    "vllm.enable_prefix_caching": _none("prefixes are cached unless run.deterministic is set"),
    "vllm.enforce_eager": _none("engines are eager on CPU and where run.deterministic is set"),
    "vllm.enable_sleep": _ours("rollout.sleep", note="with cluster.colocate engines sleep anyhow"),
    "train.async_enable": _ours("rollout.mode", note="one_step_off, or windowed"),
    "train.async_queue_size": _ours("rollout.window", note="with rollout.mode=windowed"),
    "train.partial_rollout_enable": _ours("rollout.partial", note="with rollout.mode=windowed"),
}  # fmt: skip

_SIZES: dict[str, Answer] = {
    "rollout.batch_size": _ours("batch.prompts_per_step"),
    "rollout.n_samples_per_prompt": _ours("batch.samples_per_prompt"),
    "rollout.vllm_generate_batch_size": _none("an engine is given all its prompts of a step at once"),
    "rollout.micro_batch_size": _ours(MICRO_BATCH, note=FORWARD_OF_SEQUENCES),
    "rollout.max_tokens_per_gpu": _ours(MICRO_BATCH, note=FORWARD),
    "rollout.max_new_tokens": _ours("rollout.max_new_tokens"),
    "rollout.temperature": _ours("rollout.temperature"),
    "rollout.top_p": _ours("rollout.top_p"),
    "train.batch_size": _ours("batch.sequences_per_update|batch.pairs_per_update"),
    "train.micro_batch_size": _ours(MICRO_BATCH, note="counted in tokens"),
    "train.max_tokens_per_gpu": _ours(MICRO_BATCH),
    "train.dynamic_batch_enable": _none(f"micro-batches are always filled by tokens ({MICRO_BATCH})"),
    "train.max_epochs": _ours("batch.passes_per_step|epochs"),
    "train.num_episodes": _ours("steps", note="counted in steps of batch.prompts_per_step prompts"),
    "data.max_len": _ours(
        "rollout.max_model_tokens|data.max_tokens", note="in ppo data.max_prompt_tokens limits the prompt"),
    "data.max_samples": _ours("data.max_rows", note="of each file"),
    "batch_size": _ours("max_batch_tokens", note="counted in tokens"),
}  # fmt: skip

_DATA: dict[str, Answer] = {
    "data.prompt_dataset": _ours("data.path", note="several are data.sources"),
    "data.prompt_probs": _ours("data.sources", note=WEIGHTS),
    "data.prompt_split": _ours("data.split"),
    "data.dataset": _ours("data.path", note="several are data.sources"),
    "data.dataset_probs": _ours("data.sources", note=WEIGHTS),
    "data.dataset_split": _ours("data.split"),
    "data.input_key": _ours("data.prompt_key"),
    "data.output_key": _ours("data.answer_key"),
    "data.prompt_key": _ours("data.prompt_key"),
    "data.chosen_key": _ours("data.chosen_key"),
    "data.rejected_key": _ours("data.rejected_key"),
    "data.label_key": _ours("data.label_key"),
    "data.apply_chat_template": _ours("data.apply_chat_template"),
    "data.input_template": _none("write it into the rows, or let data.apply_chat_template make turns of them"),
    "data.tokenizer_chat_template": _none("put it beside the tokenizer, as chat_template.jinja"),
    "data.multiturn": _none("write each answer as a row of its own"),
    "data.disable_fast_tokenizer": _none("transformers chooses the tokenizer"),
    "data.dataloader_num_workers": _none("all rows are encoded before the first step"),
    "data.image_key": _none(NO_IMAGES),
    "data.max_images_per_prompt": _none(NO_IMAGES),
    "eval.dataset": _ours("data.evaluation_path"),
    "eval.split": _ours("data.evaluation_split"),
    "eval.steps": _ours("evaluation.every_steps", note=NEVER),
    "eval.temperature": _ours("evaluation.greedy", note="true for temperature 0; else rollout.temperature holds"),
    "eval.n_samples_per_prompt": _ours("evaluation.samples_per_prompt"),
    "use_ms": _none("save what ModelScope has as a folder, and name that"),
}

_REWARD: dict[str, Answer] = {
    "reward.normalize_enable": _ours("reward.normalize|normalize"),
    "reward.clip_range": _ours("algorithm.shaping.clip", note="one number c clips to [-c, c], before the baseline"),
    "reward.overlong_buffer_len": _ours(
        "algorithm.shaping.overlong.buffer_fraction", note="as a part of rollout.max_new_tokens"),
    "reward.overlong_penalty_factor": _ours("algorithm.shaping.overlong.penalty"),
    "reward.stop_properly_penalty_coef": _ours(
        "algorithm.shaping.missing_eos", note="rule scale, or replace where it is negative"),
    "train.agent_func_path": _ours("rollout.environment.name", note="a class of another form, see docs/environments.md"),
    "model.loss_type": _ours("loss.name"),
    "model.margin_loss_enable": _none("a column margin is read wherever the rows have it"),
    "model.compute_fp32_loss_enable": _none("losses are always computed in fp32"),
    "model.label_smoothing": _ours("loss.label_smoothing"),
    "model.aux_loss_coef": _ours("loss.router_balance"),
    "model.pretrain_mode_enable": _none("the loss is on the answer of a prompt and answer"),
    "model.beta": _ours("loss.beta"),
    "model.ipo_enable": _ours("loss.length_normalised", note="false, with loss.name=ipo"),
    "model.nll_loss_coef": _none(NO_LIKELIHOOD),
}  # fmt: skip

_ALGORITHM: dict[str, Answer] = {
    "algo.advantage.estimator": _ours(
        "algorithm.name",
        note="reinforce is reinforce++, reinforce_baseline is reinforce++_baseline, group_norm is grpo, gae is ppo; "
        "none is flash_reinforce"),
    "algo.advantage.gamma": _ours("algorithm.gamma"),
    "algo.advantage.lambd": _ours("algorithm.lam"),
    "algo.advantage.no_std_norm": _ours("algorithm.whitening", note="none, which does not subtract the mean either"),
    "algo.advantage.is_correction_level": _ours(
        "algorithm.importance.level",
        note="off is none; seq is sequence, with algorithm.importance.gating at geometric_mean where its gating is ratio"),
    "algo.advantage.is_correction_mode": _ours("algorithm.importance.rule", note="clip is truncate"),
    "algo.advantage.is_correction_gating": _ours(
        "algorithm.importance.gating", note="at level seq its ratio is geometric_mean"),
    "algo.advantage.is_correction_threshold": _ours(
        "algorithm.importance.low", "algorithm.importance.high", note="a single number is high, with low 0"),
    "algo.kl.init_coef": _ours("algorithm.kl.coefficient"),
    "algo.kl.target": _ours("algorithm.kl.target", note="in nats per sequence"),
    "algo.kl.horizon": _ours("algorithm.kl.horizon", note="in sequences"),
    "algo.kl.estimator": _ours("algorithm.kl.estimator"),
    "algo.kl.use_loss": _ours("algorithm.kl.applied_to", note="its value is loss"),
    "algo.kl.unbiased_gradient": _ours("algorithm.kl.gradient", note="true is unbiased, false is plain"),
    "algo.dynamic_filtering_enable": _ours("algorithm.dynamic_sampling", note="how often further prompts are sampled"),
    "algo.dynamic_filtering_range": _none("algorithm.dynamic_sampling keeps the prompts whose answers score differently"),
    "actor.policy_loss_type": _ours(
        "algorithm.ratio", note="ppo is token, gspo is sequence; algorithm.name=gspo chooses all parts of GSPO"),
    "actor.loss_agg_mode": _ours(
        "algorithm.aggregation", note="token-mean is tokens, seq-mean-token-mean is sequences"),
    "actor.eps_clip": _ours("algorithm.clip_low", "algorithm.clip_high"),
    "actor.eps_clip_low_high": _ours("algorithm.clip_low", "algorithm.clip_high"),
    "actor.dual_clip": _ours("algorithm.dual_clip"),
    "actor.entropy_coef": _ours("algorithm.entropy_coefficient"),
    "actor.aux_loss_coef": _none("the policy loss has no term for the router"),
    "critic.value_clip": _ours("algorithm.value_clip"),
    "critic.freezing_steps": _ours("algorithm.critic_warmup_steps", note="-1 is 0"),
}  # fmt: skip

_RUN: dict[str, Answer] = {
    "ckpt.output_dir": _ours("run.root", "run.name", note="the result is written to root/name/final"),
    "ckpt.path": _ours("run.root", "run.name", note="checkpoints are written to root/name/checkpoints"),
    "ckpt.save_steps": _ours("checkpoint.every_steps", note=NEVER),
    "ckpt.max_num": _ours("checkpoint.keep", note="2 at least"),
    "ckpt.max_mem": _none("checkpoint.keep limits the number of checkpoints"),
    "ckpt.load_enable": _none("a run goes on with `rlhf-ray resume RUN_DIR`"),
    "ckpt.save_hf": _none("final/ is a directory of transformers; `rlhf-ray export` writes one of a checkpoint"),
    "ckpt.disable_ds": _none("checkpoint.every_steps=0 writes final/ alone, any other value all that resuming needs"),
    "ckpt.best_metric_key": _ours("evaluation.keep_best", note="true or false; the best is that of highest accuracy"),
    "critic.save_value_network": _none("the critic is always written, to final/critic"),
    "train.enable_ema": _none(NO_AVERAGE),
    "train.ema_beta": _none(NO_AVERAGE),
    "train.seed": _ours("run.seed"),
    "train.full_determinism_enable": _ours("run.deterministic"),
    "logger.logging_steps": _none("every step is logged"),
    "logger.tensorboard_dir": _ours("monitoring.trackers", note=TENSORBOARD),
    "logger.wandb.key": _ours("monitoring.trackers", note=WANDB_KEY),
    "logger.wandb.run_name": _ours("run.name"),
    "logger.wandb.project": _ours("monitoring.project"),
    "logger.wandb.org": _none("wandb reads it from WANDB_ENTITY"),
    "logger.wandb.group": _none("wandb reads it from WANDB_RUN_GROUP"),
    "host": _ours("host|expose.host"),
    "port": _ours("port|expose.port"),
}  # fmt: skip

FLAGS: Mapping[str, Answer] = {
    **_MODELS,
    **_ENGINE,
    **_PLACEMENT,
    **_SIZES,
    **_DATA,
    **_REWARD,
    **_ALGORITHM,
    **_RUN,
}
"""Each flag of 0.11.2, without its dashes."""
