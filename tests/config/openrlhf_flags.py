"""The flags of OpenRLHF 0.11.2, read from its command lines, each with what it is called here; written by hand.

``-``: it has no counterpart. ``a|b``: the first of the two that the kind of job has. ``ROLE`` is each role of the job.
"""

from __future__ import annotations

TRAIN_PPO_RAY = """
ref.num_nodes reference.ranks
ref.num_gpus_per_node reference.ranks
reward.num_nodes reward.ranks
reward.num_gpus_per_node reward.ranks
train.colocate_actor_ref policy.resources.gpus_per_rank reference.resources.gpus_per_rank
actor.num_nodes policy.ranks
actor.num_gpus_per_node policy.ranks
critic.num_nodes critic.ranks
critic.num_gpus_per_node critic.ranks
train.colocate_critic_reward critic.resources.gpus_per_rank reward.resources.gpus_per_rank
train.colocate_all cluster.colocate
vllm.num_engines rollout.engines
vllm.tensor_parallel_size rollout.tensor_parallel
vllm.sync_backend rollout.weight_transport
vllm.sync_with_ray rollout.weight_transport
vllm.enable_prefix_caching -
vllm.enforce_eager -
vllm.enable_sleep rollout.sleep
vllm.gpu_memory_utilization rollout.gpu_memory_utilization
algo.advantage.is_correction_level algorithm.importance.level
algo.advantage.is_correction_mode algorithm.importance.rule
algo.advantage.is_correction_gating algorithm.importance.gating
algo.advantage.is_correction_threshold algorithm.importance.low algorithm.importance.high
train.async_enable rollout.mode
train.async_queue_size rollout.window
train.partial_rollout_enable rollout.partial
eval.steps evaluation.every_steps
ckpt.save_steps checkpoint.every_steps
logger.logging_steps -
ckpt.path run.root run.name
ckpt.save_hf -
ckpt.disable_ds -
ckpt.max_num checkpoint.keep
ckpt.max_mem -
ckpt.load_enable -
ckpt.best_metric_key evaluation.keep_best
ds.use_universal_ckpt -
local_rank -
ds.zero_stage ROLE.engine.zero
actor.gradient_checkpointing_enable policy.model.gradient_checkpointing
ds.deepcompile -
ds.param_dtype ROLE.model.dtype
train.enable_ema -
train.ema_beta -
ds.zpg -
ds.adam_offload ROLE.engine.offload
ds.attn_implementation ROLE.model.attention
ds.experts_implementation -
ds.use_liger_kernel -
ds.grad_accum_dtype -
ds.overlap_comm -
actor.gradient_checkpointing_reentrant -
data.disable_fast_tokenizer -
data.dataloader_num_workers -
ds.enable_sleep cluster.colocate
ds.tensor_parallel_size -
ds.packing_samples -
train.dynamic_batch_enable -
rollout.max_tokens_per_gpu batch.max_tokens_per_micro_batch
train.max_tokens_per_gpu batch.max_tokens_per_micro_batch
ds.load_in_4bit ROLE.model.quantization
ds.lora.rank ROLE.model.lora.rank
ds.lora.alpha ROLE.model.lora.alpha
ds.lora.target_modules ROLE.model.lora.targets
ds.lora.dropout ROLE.model.lora.dropout
ckpt.output_dir run.root run.name
train.num_episodes steps
rollout.batch_size batch.prompts_per_step
rollout.vllm_generate_batch_size -
rollout.micro_batch_size batch.max_tokens_per_micro_batch
train.max_epochs batch.passes_per_step|epochs
data.max_len rollout.max_model_tokens|data.max_tokens
rollout.max_new_tokens rollout.max_new_tokens
data.max_samples data.max_rows
actor.eps_clip algorithm.clip_low algorithm.clip_high
actor.eps_clip_low_high algorithm.clip_low algorithm.clip_high
actor.dual_clip algorithm.dual_clip
critic.value_clip algorithm.value_clip
algo.advantage.lambd algorithm.lam
algo.advantage.gamma algorithm.gamma
train.micro_batch_size batch.max_tokens_per_micro_batch
train.batch_size batch.sequences_per_update|batch.pairs_per_update
reward.normalize_enable reward.normalize|normalize
rollout.top_p rollout.top_p
rollout.temperature rollout.temperature
train.seed run.seed
train.full_determinism_enable run.deterministic
critic.freezing_steps algorithm.critic_warmup_steps
rollout.n_samples_per_prompt batch.samples_per_prompt
critic.save_value_network -
algo.kl.target algorithm.kl.target
algo.kl.horizon algorithm.kl.horizon
algo.kl.init_coef algorithm.kl.coefficient
actor.policy_loss_type algorithm.ratio
actor.loss_agg_mode algorithm.aggregation
algo.kl.estimator algorithm.kl.estimator
algo.kl.unbiased_gradient algorithm.kl.gradient
actor.aux_loss_coef -
actor.entropy_coef algorithm.entropy_coefficient
reward.clip_range algorithm.shaping.clip
actor.optim -
actor.muon.lr -
actor.muon.momentum -
actor.muon.ns_steps -
actor.muon.nesterov -
actor.muon.no_nesterov -
actor.adam.lr policy.engine.optimizer.learning_rate
actor.adam.betas policy.engine.optimizer.betas
actor.adam.eps policy.engine.optimizer.eps
actor.adam.weight_decay policy.engine.optimizer.weight_decay
actor.lr_scheduler policy.engine.optimizer.schedule
actor.lr_warmup_ratio policy.engine.optimizer.warmup_fraction
actor.min_lr_ratio policy.engine.optimizer.final_fraction
actor.max_norm policy.engine.optimizer.max_grad_norm
critic.optim -
critic.muon.lr -
critic.muon.momentum -
critic.muon.ns_steps -
critic.muon.nesterov -
critic.muon.no_nesterov -
critic.adam.lr critic.engine.optimizer.learning_rate
critic.adam.betas critic.engine.optimizer.betas
critic.adam.eps critic.engine.optimizer.eps
critic.adam.weight_decay critic.engine.optimizer.weight_decay
critic.lr_scheduler critic.engine.optimizer.schedule
critic.lr_warmup_ratio critic.engine.optimizer.warmup_fraction
critic.min_lr_ratio critic.engine.optimizer.final_fraction
critic.max_norm critic.engine.optimizer.max_grad_norm
algo.advantage.estimator algorithm.name
algo.kl.use_loss algorithm.kl.applied_to
algo.advantage.no_std_norm algorithm.whitening
reward.overlong_buffer_len algorithm.shaping.overlong.buffer_fraction
reward.overlong_penalty_factor algorithm.shaping.overlong.penalty
reward.stop_properly_penalty_coef algorithm.shaping.missing_eos
ds.ring_attn_size -
ds.ring_attn_head_stride -
actor.model_name_or_path policy.model.path
reward.model_name_or_path reward.model.path
reward.remote_url reward.url
critic.model_name_or_path critic.model.path
ds.value_head_prefix ROLE.model.value_head_prefix
ref.offload reference.engine.offload
reward.offload reward.engine.offload
train.agent_func_path rollout.environment.name
data.prompt_dataset data.path
data.prompt_probs data.sources
data.prompt_split data.split
eval.dataset data.evaluation_path
eval.split data.evaluation_split
eval.temperature evaluation.greedy
eval.n_samples_per_prompt evaluation.samples_per_prompt
data.input_key data.prompt_key
data.label_key data.label_key
data.input_template -
data.apply_chat_template data.apply_chat_template
logger.wandb.key monitoring.trackers
logger.wandb.org -
logger.wandb.group -
logger.wandb.project monitoring.project
logger.wandb.run_name run.name
algo.dynamic_filtering_enable algorithm.dynamic_sampling
algo.dynamic_filtering_range -
data.image_key -
data.max_images_per_prompt -
actor.freeze_visual_encoder -
logger.tensorboard_dir monitoring.trackers
use_ms -
"""

FURTHER_FLAGS = """
model.gradient_checkpointing_enable policy.model.gradient_checkpointing|reward.model.gradient_checkpointing
model.gradient_checkpointing_reentrant -
model.model_name_or_path policy.model.path|reward.model.path
model.aux_loss_coef loss.router_balance
model.compute_fp32_loss_enable -
model.margin_loss_enable -
model.loss_type loss.name
optim -
muon.lr -
muon.momentum -
muon.ns_steps -
muon.nesterov -
muon.no_nesterov -
adam.lr ROLE.engine.optimizer.learning_rate
adam.betas ROLE.engine.optimizer.betas
adam.eps ROLE.engine.optimizer.eps
adam.weight_decay ROLE.engine.optimizer.weight_decay
lr_scheduler ROLE.engine.optimizer.schedule
lr_warmup_ratio ROLE.engine.optimizer.warmup_fraction
min_lr_ratio ROLE.engine.optimizer.final_fraction
max_norm ROLE.engine.optimizer.max_grad_norm
data.dataset data.path
data.dataset_probs data.sources
data.dataset_split data.split
data.prompt_key data.prompt_key
data.chosen_key data.chosen_key
data.rejected_key data.rejected_key
data.tokenizer_chat_template -
model.pretrain_mode_enable -
data.multiturn -
data.output_key data.answer_key
model.beta loss.beta
model.ipo_enable loss.length_normalised
model.label_smoothing loss.label_smoothing
model.nll_loss_coef -
ref.model_name_or_path reference.model.path
port port|expose.port
host host|expose.host
batch_size max_batch_tokens
"""
"""Those of ``train_rm``, ``train_sft``, ``train_dpo`` and ``serve_rm`` that ``train_ppo_ray`` does not have."""


def read_table(text: str) -> dict[str, tuple[str, ...]]:
    """The keys of each flag; none where it has no counterpart."""
    rows = [line.split() for line in text.strip().splitlines()]
    return {flag: () if keys == ["-"] else tuple(keys) for flag, *keys in rows}
