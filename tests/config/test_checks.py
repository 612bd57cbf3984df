"""What values may not be together: each rule fires on its case, names key, value and way out, and on nothing else."""

from __future__ import annotations

import re

import pytest

from rlhf_ray.config.loading import parse_config
from rlhf_ray.config.recipes import recipes
from rlhf_ray.config.sections.data import DataConfig
from rlhf_ray.errors import ConfigError

LORA = "policy.model.lora={rank: 4}"
BY_TURNS = [
    "cluster.colocate=true", *(f"{role}.resources.gpus_per_rank=1" for role in ("policy", "critic", "reference", "rollout")),
    "reward.resources.gpus_per_rank=1", "policy.engine.zero=1", "critic.engine.zero=2",
]  # fmt: skip
CASES = [
    # sizes
    ("ppo", ["batch.sequences_per_update=6"],
     "batch.sequences_per_update: 6 does not divide the 16 sequences of a step (prompts_per_step 16 x samples_per_prompt 1)"
     ": the nearest size that does is 4"),
    ("ppo", ["batch.sequences_per_update=64"],
     "batch.sequences_per_update: 64 does not divide the 16 sequences of a step (prompts_per_step 16 x samples_per_prompt "
     "1): the nearest size that does is 16"),
    ("ppo", ["policy.ranks=9"],
     "policy.ranks: 9 ranks cannot share 8 (batch.sequences_per_update): lower the one or raise the other"),
    ("ppo", ["reference.ranks=17"],
     "reference.ranks: 17 ranks cannot share 16 (batch.prompts_per_step x samples_per_prompt): lower the one or raise"),
    ("sft", ["policy.ranks=9"], "policy.ranks: 9 ranks cannot share 8 (batch.sequences_per_update)"),
    ("rm", ["reward.ranks=9"], "reward.ranks: 9 ranks cannot share 8 (batch.pairs_per_update)"),
    ("ppo", ["rollout.engines=17"],
     "rollout.engines: 17 engines cannot share 16 prompts (batch.prompts_per_step): lower it"),
    # lengths
    ("ppo", ["rollout.max_model_tokens=287"],
     "rollout.max_model_tokens: 287 is below 288 (data.max_prompt_tokens 256 + rollout.max_new_tokens 32): raise it to "
     "288"),
    ("ppo", ["critic.max_tokens_per_micro_batch=287"],
     "critic.max_tokens_per_micro_batch: a micro-batch of the critic holds 287 tokens, but the longest is 288 "
     "(data.max_prompt_tokens 256 + rollout.max_new_tokens 32): raise critic.max_tokens_per_micro_batch to 288"),
    ("ppo", ["reward.max_tokens_per_micro_batch=143"], "raise reward.max_tokens_per_micro_batch to 144"),
    ("sft", ["data.max_tokens=4097"],
     "batch.max_tokens_per_micro_batch: a micro-batch of the policy holds 4096 tokens, but the longest is 4097 "
     "(data.max_tokens 4097): raise batch.max_tokens_per_micro_batch to 4097"),
    ("rm", ["data.max_tokens=2049"],
     "the longest is 4098 (the two sides of a pair, data.max_tokens 2049 each): raise batch.max_tokens_per_micro_batch to"),
    # sampling
    ("ppo", ["rollout.top_p=0"], "rollout.top_p: "),
    ("ppo", ["rollout.top_k=-1"], "rollout.top_k: "),
    ("ppo", ["rollout.top_k=1"], "rollout.top_k: 1 leaves no choice: every token has probability 1, whatever the weights"),
    ("ppo", ["rollout.min_p=1.1"], "rollout.min_p: "),
    ("ppo", ["rollout.top_p=0.9", "rollout.resources.gpus_per_rank=1"],
     "rollout.top_k: 0 with top_p 0.9 and min_p 0, but on a GPU vLLM returns the tokens that were kept"),
    ("ppo", ["run.deterministic=true", "rollout={dtype: fp32, routing_replay: true, resources: {gpus_per_rank: 1}}"],
     "rollout.routing_replay: true, but on a GPU vLLM returns experts only with its prefix cache, which run.deterministic "
     "turns off: set one of them to false"),
    # engines
    ("ppo", ["policy.engine.optimizer=null"],
     "policy.engine.optimizer: missing: this job trains the policy; set policy.engine.optimizer.learning_rate"),
    ("rm", ["reward.engine.optimizer=null"], "reward.engine.optimizer: null is not a section"),
    ("rm", ["reward.model.dtype=fp16"],
     "reward.model.dtype: fp16 at reward.engine.zero 0 does not scale the loss in DeepSpeed: set that to 1, 2 or 3, or dtype "
     "to bf16"),
    ("sft", ["policy.model.dtype=fp16", "policy.engine.zero=2"],
     "policy.model.dtype: DeepSpeed has no fp16 on CPU, and policy.resources.gpus_per_rank is 0: set that to 1, or dtype to "
     "bf16"),
    ("ppo", ["reference.model.dtype=fp16", "reference.engine.zero=3"], "reference.model.dtype: DeepSpeed has no fp16 on CPU"),
    ("rm", ["reward.engine.optimizer.schedule=constant", "reward.engine.optimizer.final_fraction=0.2"],
     "final_fraction: 0.2 has no effect: schedule is constant"),
    ("rm", ["reward.engine.optimizer.power=2.0"], "power: 2.0 belongs to the schedule polynomial, but it is cosine"),
    ("rm", ["reward.engine.optimizer={schedule: warmup_stable_decay, warmup_fraction: 0.5, decay_fraction: 0.7}"],
     "decay_fraction: 0.7 and warmup_fraction 0.5 are more than the run"),
    ("rm", ["loss.hinge_margin=2.0"], "loss.hinge_margin: 2.0 belongs to the loss hinge, but name is sigmoid"),
    ("rm", ["loss.thresholds=[1.0]"], "loss.thresholds: [1.0] belongs to the loss ordinal, but name is sigmoid"),
    ("rm", ["loss.name=ordinal", "loss.thresholds=[1.0, 0.5]"], "loss.thresholds: [1.0, 0.5] must be ascending"),
    ("rm", ["loss.label_smoothing=0.5"], "loss.label_smoothing: 0.5"),
    ("dpo", ["loss.label_smoothing=0.5"], "loss.label_smoothing: 0.5"),
    ("dpo", ["loss={name: ipo, label_smoothing: 0.1}"],
     "loss.label_smoothing: 0.1 belongs to the losses sigmoid and simpo, but name is ipo: remove it"),
    ("dpo", ["loss.simpo_gamma=0.5"], "loss.simpo_gamma: 0.5 belongs to the loss simpo, but name is sigmoid: remove it"),
    ("dpo", ["loss.desirable_weight=2.0"], "loss.desirable_weight: 2.0 belongs to the loss kto, but name is sigmoid"),
    ("dpo", ["loss={name: simpo, length_normalised: false}"],
     "loss.length_normalised: SimPO divides by the length of an answer by definition: remove it"),
    ("dpo", ["loss={name: kto, length_normalised: true}", "batch={answers_per_update: 8}"],
     "loss.length_normalised: KTO compares sums of log-probabilities by definition: remove it"),
    ("dpo", ["loss.name=kto"],
     "batch.pairs_per_update: loss.name kto reads single answers with labels: set batch.answers_per_update instead, and "
     "batch.pairs_per_update=null"),
    ("dpo", ["batch={answers_per_update: 8}"],
     "batch.answers_per_update: loss.name sigmoid reads pairs: set batch.pairs_per_update instead, and "
     "batch.answers_per_update=null"),
    ("dpo", ["batch.answers_per_update=8"], "batch: set exactly one of pairs_per_update (pairs) and answers_per_update"),
    ("dpo", ["policy.ranks=9"], "policy.ranks: 9 ranks cannot share 8 (batch.pairs_per_update)"),
    ("dpo", ["data.max_tokens=2049"],
     "the two sides of a pair, data.max_tokens 2049 each"),
    ("dpo", ["data={path: a.jsonl}"], "data.evaluation_fraction: missing: say which share of the pairs is held out"),
    ("dpo", ["data={path: a.jsonl, evaluation_fraction: 0, label_key: winner}"], "data.label_key: 'winner' would be what"),
    ("dpo", ["data.world.task=arithmetic"], "data.world.task: arithmetic has no preference pairs"),
    ("rm", ["normalization.demonstrations_path=some.jsonl"], "is not read: over is evaluation"),
    ("ppo", ["reference.engine.optimizer.learning_rate=1e-3"],
     "reference.engine.optimizer: this job does not train the reference: remove it, or set it to null"),
    ("serve", ["reward.engine.optimizer.learning_rate=1e-3"],
     "reward.engine.optimizer: this job does not train the reward"),
    ("ppo", ["reference.engine.zero=2"],
     "reference.engine.zero: stage 2 shards an optimizer, but there is none: set 0 or 3, or add optimizer"),
    ("ppo", ["policy.engine.offload=optimizer"], "policy.engine.offload: optimizer needs ZeRO: set zero to 1, 2 or 3"),
    ("ppo", ["policy.engine={zero: 2, offload: all, optimizer: {learning_rate: 1e-3}}"],
     "policy.engine.offload: all moves parameters, but zero is 2: set zero to 3, or offload to optimizer"),
    ("ppo", ["reward.engine={zero: 3, offload: optimizer}"], "reward.engine.offload: there is no optimizer to offload"),
    ("sft", ["policy.engine.optimizer.final_fraction=0.1"],
     "policy.engine.optimizer.final_fraction: 0.1 has no effect: schedule is constant; set it to cosine"),
    # models
    ("sft", ["policy.model.path=org/name"],
     "policy.model: set exactly one of path (a directory or hub id) and make (a small model made here)"),
    ("sft", ["policy.model.make=null"], "policy.model: set exactly one of path"),
    ("sft", ["policy.model.revision=main"], "policy.model.revision: a made model has no revision"),
    ("sft", ["policy.model.head_init=zero"],
     "policy.model.head_init: zero, but the policy has no score head: remove it"),
    ("sft", ["policy.model.head_dtype=model"],
     "policy.model.head_dtype: model has no effect, since dtype is fp32: remove it"),
    ("ppo", ["critic.model.head_dtype=model", "critic.model.dtype=bf16"],
     "critic.model.head_dtype: model, but the critic gives no log-probs: remove it"),
    ("rm", ["reward.model.head_init=null"],
     "reward.model.head_init: null, but a made model has no score head: set it to inv_sqrt"),
    ("sft", ["policy.model.quantization=nf4", LORA],
     "policy.model.quantization: nf4 computes in half precision, but dtype is fp32: set it to bf16"),
    ("sft", ["policy.model.quantization=nf4", "policy.model.dtype=bf16"],
     "policy.model.quantization: nf4 weights do not train: set policy.model.lora.rank, such as 16"),
    ("sft", ["policy.model.quantization=nf4", "policy.model.dtype=bf16", LORA, "policy.engine.zero=3"],
     "policy.model.quantization: nf4 weights cannot be sharded: set policy.engine.zero to 0 or 2"),
    # vLLM as the scorer
    ("serve", ["reward={model: {path: org/name}, scorer: vllm, ranks: 2}"],
     "reward.scorer: vllm runs in one process: set ranks to 1 (serve: replicas instead of ranks), or scorer to packed"),
    ("serve", ["reward={model: {path: org/name}, scorer: vllm, engine: {zero: 3}}"],
     "reward.scorer: vllm is an engine of its own: remove engine, or scorer to packed"),
    ("serve", ["reward.scorer=vllm", "reward.model={path: org/name, head_init: zero}"],
     "reward.scorer: vllm makes no fresh score head (model.head_init is zero): train one, or scorer to packed"),
    ("serve", ["reward.scorer=vllm", "reward.model={path: org/name, value_head_prefix: v_head}"],
     "reward.scorer: vllm reads a head called score (model.value_head_prefix is v_head): write one with rlhf-ray export"),
    ("serve", ["reward.scorer=vllm", "reward.model={path: org/name, lora: {rank: 4}}"],
     "reward.scorer: vllm trains no adapters: remove model.lora"),
    ("serve", ["reward.scorer=vllm", "reward.model={path: org/name, quantization: nf4}"],
     "reward.scorer: vllm runs the weights as they are: remove model.quantization"),
    ("serve", ["reward.scorer=vllm", "reward.model={path: org/name, attention: sdpa}"],
     "reward.scorer: vllm chooses its attention itself: set model.attention to auto"),
    ("serve", ["models={other: {model: {path: org/name}, scorer: vllm, ranks: 2}}"], "models.other.scorer: vllm runs in one"),
    ("ppo", ["reward.scorer=vllm"], "reward.scorer: vllm reads a model's directory, but this one is made here"),
    ("ppo", ["reward={function: world.gold, scorer: vllm}"],
     "reward.scorer: vllm runs a reward model: set model too, or remove it"),
    # the exact run
    ("ppo", ["run.deterministic=true", "critic.model.dtype=bf16"],
     "critic.model.dtype: bf16, but run.deterministic needs fp32: set one of them"),
    ("ppo", ["run.deterministic=true", "rollout.dtype=bf16"], "rollout.dtype: bf16, but run.deterministic needs fp32"),
    ("ppo", ["run.deterministic=true", "policy.resources.threads_per_rank=2"],
     "policy.resources.threads_per_rank: 2, but run.deterministic needs 1"),
    ("sft", ["run.deterministic=true", "policy.resources.gpus_per_rank=1"],
     "policy.resources.gpus_per_rank: 1, but run.deterministic runs on CPU"),
    # devices
    ("ppo", ["policy.resources.gpus_per_rank=2"],
     "policy.resources.gpus_per_rank: 2, but a rank uses one GPU: set it to 1 and raise policy.ranks"),
    ("ppo", ["reward.resources.gpus_per_rank=0.5", "reward.ranks=2"],
     "reward.resources.gpus_per_rank: 0.5 for each of 2 ranks, but two ranks of one role cannot share a GPU: set it to 1 "
     "(or anything above 0.5), which takes 2 GPUs, or reward.ranks to 1"),
    ("ppo", ["rollout.tensor_parallel=4"],
     "rollout.resources.cpus_per_rank: 1, but rollout.tensor_parallel is 4 and an engine on CPU takes one core each: set the "
     "same number, or rollout.resources.gpus_per_rank to 4"),
    ("ppo", ["rollout.tensor_parallel=4", "rollout.resources.gpus_per_rank=2"],
     "rollout.resources.gpus_per_rank: 2, but rollout.tensor_parallel is 4: an engine takes one GPU each; set the same"),
    ("ppo", ["rollout.tensor_parallel=2", "rollout.backend=transformers", "rollout.resources.cpus_per_rank=2"],
     "rollout.tensor_parallel: 2, but a transformers engine has one process: set it to 1, or backend to vllm"),
    ("ppo", ["rollout.max_num_batched_tokens=9000", "rollout.backend=transformers"],
     "rollout.max_num_batched_tokens: 9000, but only vllm counts the tokens of a step: remove it"),
    ("ppo", ["rollout.max_num_batched_tokens=100"],
     "rollout.max_num_batched_tokens: 100 is below max_model_tokens, 512, and a step holds at least that: raise it to 512"),
    ("ppo", ["rollout.max_num_batched_tokens=600", "rollout.max_num_seqs=700"],
     "rollout.max_num_batched_tokens: 600 is below max_num_seqs, 700, and a step holds at least that: raise it to 700"),
    ("ppo", ["policy.ranks=2", "policy.resources.gpus_per_rank=0.6", "rollout.engines=2",
             "rollout.resources.gpus_per_rank=0.5", "rollout.gpu_memory_utilization=0.5"],
     "policy.resources.gpus_per_rank: the ranks of several roles share each GPU, and policy 0.6 + rollout 0.5 is 1.1 of one: "
     "lower them to 1 in all, or set those of a role to 1"),
    ("ppo", ["rollout.resources.gpus_per_rank=2"],
     "rollout.resources.gpus_per_rank: 2, but rollout.tensor_parallel is 1"),
    ("ppo", ["rollout.resources.gpus_per_rank=0.3"],
     "rollout.gpu_memory_utilization: 0.9 of a GPU's memory, but rollout.resources.gpus_per_rank is 0.3 and other roles share "
     "that GPU: lower it to 0.3, or set rollout.sleep"),
    ("ppo", ["rollout.lora=adapter", "rollout.backend=transformers"],
     "rollout.lora: adapter, but a transformers engine takes none: set it to merged, or backend to vllm"),
    ("ppo", [LORA, "rollout.lora=adapter", "rollout.weight_delta=true"],
     "rollout.lora: adapter, but then no weights travel whose changes weight_delta could send: remove weight_delta"),
    ("ppo", [LORA, "rollout.lora=adapter", "rollout.sleep=true", "rollout.resources.gpus_per_rank=0.3"],
     "rollout.lora: adapter, which an engine whose cache sleeps may not take: set it to merged, or remove sleep"),
    ("ppo", ["rollout.sleep=true"],
     "rollout.sleep: true, but it is for a vllm engine that shares a GPU with other roles (backend is vllm, "
     "resources.gpus_per_rank 0): remove it"),
    ("ppo", ["rollout.mode=one_step_off", "algorithm.max_staleness=0"],
     "algorithm.max_staleness: 0, but rollout.mode one_step_off trains on answers 1 publication(s) old: raise it to 1, "
     "remove it, or set rollout.mode to sync"),
    ("ppo", ["rollout.mode=windowed", "rollout.window=3", "algorithm.max_staleness=2"],
     "algorithm.max_staleness: 2, but rollout.mode windowed trains on answers 3 publication(s) old: raise it to 3"),
    ("ppo", ["rollout.mode=windowed", "run.deterministic=true", "rollout.dtype=fp32"],
     "rollout.mode: windowed, but which weights sample an answer is then a matter of time, and run.deterministic is true"),
    ("ppo", ["rollout.mode=one_step_off", "rollout.partial=true"],
     "rollout.partial: true, but in mode one_step_off no answer is in work when weights change: set mode to windowed, or"),
    ("ppo", ["rollout.mode=windowed", "algorithm.dynamic_sampling=2", "batch.samples_per_prompt=2"],
     "algorithm.dynamic_sampling: 2, but rollout.mode windowed replaces no prompts: set it to 0"),
    ("ppo", ["rollout.mode=windowed", "algorithm.collector=mine.py:Mine"],
     "algorithm.collector: mine.py:Mine, but rollout.mode windowed collects by itself: remove it"),
    ("ppo", ["rollout.mode=one_step_off", "rollout.sleep=true", "rollout.resources.gpus_per_rank=0.3"],
     "rollout.sleep: true, but in mode one_step_off the engines sample while the trainer learns, so that both need the memory: "
     "set mode to sync"),
    ("ppo", ["rollout.sleep=true", "rollout.resources.gpus_per_rank=1"],
     "(backend is vllm, resources.gpus_per_rank 1): remove it"),
    ("ppo", ["cluster.address=auto", "cluster.num_cpus=4"],
     "cluster.num_cpus: 4 counts only where Ray is started here: remove it, or address"),
    # rewards and data
    ("ppo", ["reward.function=rewards.py:score"],
     "reward: set exactly one of model (a reward model), ensemble (several), function (Python), url (a scoring backend), "
     "source (Python), judge (a language model) and mixture, found model and function"),
    ("ppo", ["reward={ensemble: [org/one]}"],
     "reward.ensemble: org/one alone is no ensemble: name more models, or write model={path: ...}"),
    ("ppo", ["reward={ensemble: [org/one, org/two, org/one]}"],
     "reward.ensemble: org/one is named twice, and would agree with itself: name each model once"),
    ("ppo", ["reward={model: {path: org/one}, ensemble: [org/one]}"],
     "reward.ensemble: org/one is named twice, and would agree with itself: name each model once"),
    ("ppo", ["reward={model: {path: org/one}, k: 2.0}"],
     "reward.k: 2.0 is for an ensemble of reward models: set ensemble too, or remove it"),
    ("ppo", ["reward={ensemble: [org/one, org/two], reduction: minimum, k: 2.0}"],
     "reward.k: 2 is for the reduction mean_minus_std, but it is minimum: remove it"),
    ("ppo", ["reward={ensemble: [org/one, org/two], reduction: weights, normalize: true}"],
     "reward.normalize: averaged weights have no mean and deviation of their own: set it to false, or reduction to mean"),
    ("ppo", ["reward={ensemble: [org/one, org/two], function: gsm8k}"],
     "reward: set exactly one of model (a reward model), ensemble (several), function (Python), url (a scoring backend), "
     "source (Python), judge (a language model) and mixture, found ensemble and function"),
    ("ppo", ["reward={}"], "reward: set exactly one of model"),
    ("ppo", ["reward={function: score}"],
     "reward.function: 'score' is not one of package.module:name, path.py:name, gsm8k, exact_match, world.gold, world"),
    ("ppo", ["reward={function: environment}"],
     "reward.function: environment stands for the rewards of rollout.environment, which is null: set it"),
    ("ppo", ["reward={mixture: {a: {function: environment}}}", "rollout.environment={name: 'a.b:C'}"],
     "reward.mixture.a.function: environment stands for the rewards of rollout.environment, which cannot be a term of a"),
    ("ppo", ["rollout.environment={name: 'a.b:C'}"],
     "rollout.environment: an environment gives the rewards itself: set reward to {function: environment}, or environment"),
    ("ppo", ["rollout.environment={name: 'a.b:C'}", "reward={function: environment}",
                                                                    "algorithm.shaping.overlong={penalty: 1.0}"],
     "algorithm.shaping.overlong: it would compare the tokens of all turns of an episode with rollout.max_new_tokens, the "
     "limit of one: set it to null"),
    ("ppo", ["rollout.environment={name: 'a.b:C'}", "reward={function: environment}",
                                                                    "algorithm.shaping.too_short={tokens: 5}"],
     "algorithm.shaping.too_short: it would compare the tokens of all turns of an episode with 5, the least of one answer: "
     "set it to null"),
    ("ppo", ["rollout.environment={name: 'a.b:C'}", "reward={function: environment}", "rollout.mode=windowed"],
     "rollout.mode: windowed streams single answers and plays no episodes of several turns: set it to sync or"),
    ("ppo", ["rollout.environment={name: Guess}", "reward={function: environment}"],
     "rollout.environment.name: 'Guess' is not one of package.module:name, path.py:name, nor an installed entry point of"),
    ("ppo", ["reward={url: 'localhost:5000'}"],
     "reward.url: 'localhost:5000' is not the address of a scoring backend: write http://host:port"),
    ("ppo", ["reward={url: 'http://x:a-secret-token-here@localhost:5000'}"],
     "reward.url: it holds a password, which config.yaml and reports would show: write it into a file, give token_file"),
    ("ppo", ["reward={function: gsm8k, token_file: token}"],
     "reward.token_file: it holds the token of a scoring backend or a judge: set url or judge too, or remove it"),
    ("ppo", ["reward.samples_per_call=8"],
     "reward.samples_per_call: a reward model forms its batches by tokens: set max_tokens_per_micro_batch"),
    ("ppo", ["reward={mixture: {right: {}}}"],
     "reward.mixture.right: set exactly one of model, ensemble, function, url, source and judge"),
    ("ppo", ["reward={mixture: {right: {function: gsm8k, weight: 0.0}}}"],
     "reward.mixture.right.weight: 0 leaves the term without effect: remove it, or give it a weight or a gate"),
    ("ppo", ["reward={mixture: {right: {function: gsm8k, weight: 0.0, gate: 1.0}}}"],
     "reward.mixture: every term has weight 0, so that all answers have one reward: give one a weight"),
    ("ppo", ["reward={mixture: {right: {function: gsm8k}}, floor: -1.0}"],
     "reward.floor: -1 is the reward where a gate is not passed, and no term has one: remove it"),
    ("ppo", ["reward={function: gsm8k, steps: sum}"],
     "reward.steps: sum is for a function or a source of your own, which gives steps: set one, or remove it"),
    ("ppo", ["reward={judge: {model: m, rubric: Good.}}"], "reward.judge.url: missing"),
    ("ppo", ["reward={judge: {url: 'api.openai.com', model: m, rubric: Good.}}"],
     "reward.judge.url: 'api.openai.com' is not the address of an endpoint: write one such as https://api.openai.com/v1"),
    ("ppo", ["reward={judge: {url: 'http://x:a-secret-token-here@x/v1', model: m, rubric: Good.}}"],
     "reward.judge.url: it holds a password, which config.yaml and reports would show: give token_file or key_variable"),
    ("ppo", ["reward={judge: {url: 'http://x/v1?key=a-secret-token-here', model: m, rubric: Good.}}"],
     "reward.judge.url: /chat/completions cannot follow what stands after ? or #: end it before them, and give a key by "
     "key_variable"),
    ("ppo", ["reward={judge: {url: 'http://x/v1', model: m, rubric: Good., compare: all}}", "batch.samples_per_prompt=1",
             "evaluation.samples_per_prompt=2"],
     "batch.samples_per_prompt: 1, but reward.judge.compare compares the answers to a prompt: set it to 2 or more"),
    ("ppo", ["reward={judge: {url: 'http://x/v1', model: m, rubric: Good., compare: all}}", "batch.samples_per_prompt=2"],
     "evaluation.samples_per_prompt: 1, but reward.judge.compare compares the answers to a prompt: set it to 2 or more"),
    ("ppo", ["reward={judge: {url: 'http://x/v1', model: m, rubric: Good., compare: pairs}}", "batch.samples_per_prompt=4",
             "evaluation.samples_per_prompt=3"],
     "evaluation.samples_per_prompt: 3 answers to a prompt do not make pairs, which reward.judge.compare asks for: set an even "
     "number"),
    ("ppo", ["reward={judge: {url: 'http://x/v1', model: m, rubric: Good., compare: all, scale: [0, 5]}}",
             "batch.samples_per_prompt=2", "evaluation.samples_per_prompt=2"],
     "reward.judge.scale: answers are compared (all) and have no scores of their own: remove one of them"),
    ("ppo", ["reward={judge: {url: 'http://x/v1', model: m, rubric: Good., compare: pairs, ranking: bradley_terry}}",
             "batch.samples_per_prompt=2", "evaluation.samples_per_prompt=2"],
     "reward.judge.ranking: bradley_terry sets no answer of one pair against those of another: set compare to circle or all, "
     "or ranking to win_share"),
    ("ppo", ["reward={judge: {url: 'http://x/v1', model: m, rubric: Good., both_orders: false}}"],
     "reward.judge.both_orders: False is about comparisons of answers: set compare too, or remove it"),
    ("ppo", ["reward={judge: {url: 'http://x/v1', model: m}}"],
     "reward.judge: nothing says what makes an answer good: set rubric, parts, or reference to true"),
    ("ppo", ["reward={judge: {url: 'http://x/v1', model: m, parts: {right: {asks: It is right.}}}}"],
     "reward.judge.parts.right.weight: missing"),
    ("ppo", ["reward={judge: {url: 'http://x/v1', model: m, parts: {right: {asks: It is right., weight: 0.0, gate: 5.0}}}}"],
     "reward.judge.parts: every weight is 0, so that all answers have one reward: give a part a weight"),
    ("ppo", ["reward={judge: {url: 'http://x/v1', model: m, parts: {right: {asks: It is right., weight: 1.0, gate: 11.0}}}}"],
     "reward.judge.parts.right.gate: 11 lets all pass or none: give a score above 0, up to 10"),
    ("ppo", ["reward={judge: {url: 'http://x/v1', model: m, rubric: Good., floor: -1.0}}"],
     "reward.judge.floor: -1 is the reward where a gate is not passed, and no part has one: remove it"),
    ("ppo", ["reward={judge: {url: 'http://x/v1', model: m, rubric: Good., scale: [10, 0]}}"],
     "reward.judge.scale: [10, 0] is no range: give the worst score and then the best, such as [0, 10]"),
    ("ppo", ["reward={judge: {url: 'http://x/v1', model: m, rubric: Good., max_cost: 5.0}}"],
     "reward.judge.max_cost: 5 is never reached without prices: set prompt_price and reply_price"),
    ("ppo", ["reward={judge: {url: 'http://x/v1', model: m, rubric: Good., parameters: {stream: true}}}"],
     "reward.judge.parameters: stream is not for you to send: remove it"),
    ("ppo", ["reward={judge: {url: 'http://x/v1', model: m, rubric: Good.}, normalize: true}"],
     "reward.normalize: the mean and deviation stand in a reward model's directory: a judge has none"),
    ("ppo", ["reward={judge: {url: 'http://x/v1', model: m, rubric: Good.}, samples_per_call: 8}"],
     "reward.samples_per_call: a judge is asked one question a request: set judge.concurrency"),
    ("ppo", ["reward={mixture: {right: {function: gsm8k, wieght: 2.0}}}"],
     "reward.mixture.right.wieght: unknown key; did you mean reward.mixture.right.weight?"),
    ("ppo", ["reward={mixture: {right: {function: gsm8k, weight: much}}}"],
     "reward.mixture.right.weight: 'much' is not a number"),
    ("ppo", ["reward={mixture: {'a b': {function: gsm8k}}}"],
     "reward.mixture: 'a b' is not a valid name: use letters, digits and '_', beginning with a letter"),
    ("ppo", ["reward={mixture: {right: gsm8k}}"], "reward.mixture.right: 'gsm8k' is not a section with keys model"),
    ("ppo", ["reward={mixture: [gsm8k]}"], "reward.mixture: [gsm8k] is not a mapping of names to sections, each with"),
    ("ppo", ["reward={mixture: {good: {model: {path: org/name}, engine: {optimizer: {learning_rate: 0.1}}}}}"],
     "reward.mixture.good.engine.optimizer: this job does not train the reward.mixture.good: remove it"),
    ("ppo", ["reward={function: world.gold, normalize: true}"],
     "reward.normalize: the mean and deviation stand in a reward"),
    ("ppo", ["reward={function: world.gold}", "data={path: rows.jsonl}"],
     "reward.function: world.gold scores answers to the customers of the generated world: set data.world to {}"),
    ("sft", ["data.path=rows.jsonl"],
     "data: world and path (rows.jsonl) exclude each other: add data.world=null or data.path=null"),
    ("sft", ["data.world=null"], "data: set one of world (the generated world: {}), path (a data file) and sources (several)"),
    ("sft", ["data={path: a.jsonl, evaluation_path: b.jsonl, evaluation_fraction: 0.1}"],
     "data: evaluation_path and evaluation_fraction exclude each other"),
    ("sft", ["data={path: a, evaluation_split: test, evaluation_fraction: 0.1}"],
     "data: evaluation_split and evaluation_fraction exclude each other"),
    ("sft", ["data={sources: {a: {path: a}}, evaluation_split: test}"],
     "data: evaluation_split is a split of evaluation_path, or else of path: set one of them"),
    ("sft", ["data={path: a, evaluation_fraction: 0.1, shared_prompts: drop}"],
     "data.shared_prompts: drop is about rows of evaluation_path or evaluation_split, and neither is set: remove it"),
    ("rm", ["data.shared_prompts=keep"],
     "data.shared_prompts: keep is about rows of evaluation_path or evaluation_split, and neither is set: remove it"),
    ("sft", ["data.split=train"], "data.split: the rows of the generated world are made and have no splits"),
    ("sft", ["data.evaluation_fraction=0.1"], "data: the generated world holds out its own rows"),
    ("rm", ["data={path: a.jsonl}"], "data.evaluation_fraction: missing: say which share of the pairs is held out"),
    ("rm", ["data={path: a.jsonl, sources: {b: {path: b.jsonl}}, evaluation_fraction: 0}"],
     "data: path and sources (a.jsonl) exclude each other: add data.path=null or data.sources={}"),
    ("rm", ["data.apply_chat_template=true"], "data.apply_chat_template: the generated world is plain text"),
    ("ppo", ["data.too_long=cut_prompt"], "data.too_long: cut_prompt is for preference pairs"),
    ("ppo", ["data.train_on=all"], "data.train_on: all is for demonstrations (sft), and this job's rows are none: remove it"),
    ("rm", ["data.train_on=last_answer"], "data.train_on: last_answer is for demonstrations (sft)"),
    ("rm", ["data={path: a.jsonl, evaluation_fraction: 0, label_key: winner}"],
     "data.label_key: 'winner' would be what reward functions compare sampled answers with"),
    ("sft", ["data={sources: {a: {path: a.jsonl, label_key: x}}}"], "data.sources.a.label_key: 'x' would be what reward"),
    ("sft", ["data.max_rows=10"], "data.max_rows: 10 limits a file, but the rows are made"),
    (
        "sft",
        ["data.world.task=arithmetic", "data.world.raters=flattered"],
        "data.world.raters: flattered raters judge letters, and sums have none: set it to careless",
    ),
    ("ppo", ["data.world.prompts=15"],
     "data.world.prompts: 15 is below batch.prompts_per_step 16: raise it or lower that"),
    ("ppo", ["data.world.evaluation_prompts=10"],
     "data.world.evaluation_prompts: 10 is below evaluation.prompts 300: raise it or lower that"),
    # evaluation, stop tokens, tasks
    ("ppo", ["evaluation.greedy=true", "evaluation.samples_per_prompt=4"],
     "evaluation.samples_per_prompt: 4 greedy answers to a prompt are all the same: set it to 1"),
    ("ppo", ["evaluation.pass_at=[1, 8]", "evaluation.samples_per_prompt=4"],
     "evaluation.pass_at: 8 of 4 samples: raise samples_per_prompt to it"),
    ("ppo", ["evaluation.gold=judge"], "evaluation.gold: 'judge' is not one of package.module:name, path.py:name, gsm8k"),
    ("ppo", ["evaluation.gold=world.gold", "data.world.task=arithmetic"],
     "evaluation.gold: world.gold scores answers to the customers of the generated world"),
    ("ppo", ["rollout.stop_tokens=stop"], "rollout.stop_tokens: 'stop' is not a list, each a text"),
    ("rm", ["data.world.task=arithmetic"],
     "data.world.task: arithmetic has no preference pairs, since a function verifies it: set it to customers"),
    # serving
    ("serve", ["host=0.0.0.0"], "host: 0.0.0.0 is open to others: set token_file to a file that holds a token"),
    ("serve", ["max_tokens=10000"],
     "max_batch_tokens: 8192 does not hold one item of max_tokens 10000: raise it to that"),
    # turns
    ("sft", ["cluster.colocate=true"],
     "cluster.colocate: true, but only a job of kind ppo has roles that take turns, and this one is sft: remove it"),
    ("serve", ["cluster.colocate=true"], "cluster.colocate: true, but only a job of kind ppo has roles that take turns"),
    ("ppo", [*BY_TURNS, "rollout.resources.gpus_per_rank=0"],
     "cluster.colocate: true, but rollout.resources.gpus_per_rank is 0, and vLLM has no sleep mode on a CPU: set that to 1, or "
     "this to false"),
    ("ppo", [*BY_TURNS, "policy.resources.gpus_per_rank=0"],
     "cluster.colocate: true, but policy.resources.gpus_per_rank is 0: set that to 1, or this to false"),
    ("ppo", [*BY_TURNS, "rollout.backend=transformers"],
     "rollout.backend: transformers engines do not sleep: set it to vllm, or cluster.colocate to false"),
    ("ppo", [*BY_TURNS, "rollout.mode=one_step_off"],
     "rollout.mode: one_step_off, but then the engines generate while the policy learns, and cluster.colocate is true: set it "
     "to sync, or cluster.colocate to false"),
    ("ppo", [*BY_TURNS, "rollout.mode=windowed"], "rollout.mode: windowed, but then the engines generate while"),
    ("ppo", [*BY_TURNS, "rollout.tensor_parallel=2", "rollout.resources.gpus_per_rank=2"],
     "rollout.tensor_parallel: 2, but Ray shares no engine of several GPUs with other roles: set it to 1"),
    ("ppo", [*BY_TURNS, LORA, "rollout.lora=adapter"],
     "rollout.lora: adapter, which an engine whose cache sleeps may not take: set it to merged, or cluster.colocate to false"),
    ("ppo", [*BY_TURNS, "expose={port: 5000}"],
     "expose: its callers may come while the reward models are not on the GPUs: remove it, or cluster.colocate to false"),
    ("ppo", [*BY_TURNS, "policy.engine.zero=0"],
     "policy.engine.zero: 0, at which DeepSpeed keeps the optimizer on its GPU: set it to 1 or 2, or cluster.colocate to "
     "false"),
    ("ppo", [*BY_TURNS, "policy.engine.zero=3"],
     "policy.engine.offload: none at policy.engine.zero 3, where DeepSpeed moves weights alone, beside an optimizer that is on "
     "the host for good: set it to optimizer, or policy.engine.zero to 2, or cluster.colocate to false"),
    ("ppo", [*BY_TURNS, "critic.engine.zero=3", "critic.engine.offload=all"],
     "critic.engine.offload: all at critic.engine.zero 3"),
    ("ppo", [*BY_TURNS, "policy.engine.zero=3", "policy.engine.offload=optimizer", LORA],
     "policy.engine.zero: 3 with policy.model.lora, whose frozen weights DeepSpeed does not move: set it to 2"),
    ("ppo", [*BY_TURNS, "policy.model.dtype=bf16", LORA, "policy.model.quantization=nf4"],
     "policy.model.quantization: nf4 weights stay on their GPU: remove it, or cluster.colocate to false"),
    ("ppo", [*BY_TURNS, "reference.placement.strategy=spread"],
     "reference.placement: it differs from that of policy, but the ranks of both lie on the same GPUs"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "overrides", "message"), CASES)
def test_a_contradiction_is_the_one_problem_and_shows_the_way_out(problems, kind, overrides, message):
    reported = problems(kind, *overrides)
    assert len(reported) == 1, reported
    assert message in reported[0]


ALLOWED = [
    ("ppo", BY_TURNS),
    ("ppo", [*BY_TURNS, "policy.ranks=4", "rollout.engines=8", "reference=null", "reward.resources.gpus_per_rank=0"]),
    ("ppo", [*BY_TURNS, "policy.resources.gpus_per_rank=0.9", "rollout.resources.gpus_per_rank=0.3"]),
    ("ppo", [*BY_TURNS, "policy.engine.zero=3", "policy.engine.offload=optimizer", "reference.engine.zero=3"]),
    ("ppo", [*BY_TURNS, LORA, "critic.engine.offload=optimizer", "rollout.sleep=true", "rollout.resources.gpus_per_rank=0.5"]),
    ("ppo", ["batch.samples_per_prompt=3", "batch.sequences_per_update=48"]),
    ("ppo", ["policy.ranks=8", "reference.ranks=16", "rollout.engines=16"]),
    ("ppo", ["rollout.max_model_tokens=288", "batch.max_tokens_per_micro_batch=288"]),
    ("ppo", ["reward.max_tokens_per_micro_batch=144"]),
    ("ppo", ["run.deterministic=true"]),
    ("ppo", ["reference=null", "run.deterministic=true"]),
    ("ppo", ["reward={function: world.gold}"]),
    ("ppo", ["reward={url: 'http://localhost:5000'}"]),
    ("ppo", ["reward={mixture: {right: {function: gsm8k, weight: 2.0}, far: {url: 'http://far:5000'}}}",
             "reward.mixture.right.weight=-0.5", "reward.mixture.far.normalize=true"]),
    ("ppo", ["reward={function: rewards.py:score}", "data={path: rows.jsonl}"]),
    ("ppo", ["rollout.tensor_parallel=4", "rollout.resources.gpus_per_rank=4"]),
    ("ppo", ["rollout.tensor_parallel=4", "rollout.resources.cpus_per_rank=4"]),
    ("ppo", ["rollout.max_num_batched_tokens=512", "rollout.max_num_seqs=512"]),
    ("ppo", ["rollout.max_num_batched_tokens=256", "rollout.max_num_seqs=16", "rollout.resources.gpus_per_rank=1"]),
    ("ppo", ["reward.resources.gpus_per_rank=0.6", "reward.ranks=2"]),
    ("ppo", ["rollout.resources.gpus_per_rank=0.3", "policy.resources.gpus_per_rank=0.3",
             "rollout.gpu_memory_utilization=0.3"]),
    ("ppo", ["rollout.resources.gpus_per_rank=0.3", "rollout.backend=transformers"]),
    ("ppo", ["rollout.resources.gpus_per_rank=0.3", "rollout.sleep=true"]),
    ("ppo", [LORA, "rollout.lora=adapter"]),
    ("ppo", [f"{role}.{key}" for role in ("policy", "reward") for key in ("ranks=2", "resources.gpus_per_rank=0.5")]),
    ("ppo", ["policy.engine={zero: 3, offload: all, optimizer: {learning_rate: 1e-3}}", "reward.engine.zero=3"]),
    ("sft", ["policy.model.quantization=nf4", "policy.model.dtype=bf16", LORA, "policy.engine.zero=2"]),
    ("sft", ["policy.model.dtype=fp16", "policy.engine.zero=1", "policy.resources.gpus_per_rank=1"]),
    ("ppo", ["reward.model.dtype=fp16"]),
    ("sft", ["data.max_tokens=4096"]),
    ("rm", ["data.max_tokens=2048"]),
    ("serve", ["host=0.0.0.0", "token_file=token"]),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "overrides"), ALLOWED)
def test_what_is_at_the_edge_but_right_is_accepted(problems, kind, overrides):
    assert problems(kind, *overrides) == []


def test_the_nearest_divisor_divides(problems):
    for step in (7, 12, 30):
        for update in range(1, step + 3):
            reported = problems("ppo", f"batch.prompts_per_step={step}", f"batch.sequences_per_update={update}")
            assert bool(reported) == bool(step % update)
            if reported:
                nearest = int(re.search(r"the nearest size that does is (\d+)", reported[0])[1])
                assert step % nearest == 0
                assert not any(
                    step % size == 0 for size in range(1, step) if abs(size - update) < abs(nearest - update)
                )


def test_a_reference_that_is_not_set_is_the_starting_policy(texts):
    overrides = [
        "reference=null",
        LORA,
        "policy.ranks=2",
        "policy.max_tokens_per_micro_batch=512",
    ]
    config = parse_config(texts["ppo"], overrides)
    reference = config.reference_role
    assert (reference.ranks, reference.engine.optimizer, reference.model.lora) == (1, None, None)
    assert reference.model.make == config.policy.model.make
    assert reference.max_tokens_per_micro_batch == 512
    explicit = parse_config(texts["ppo"])
    assert explicit.reference_role is explicit.reference


def test_a_wrong_model_of_the_policy_is_not_reported_again_for_the_reference_that_it_gives(texts):
    with pytest.raises(ConfigError) as error:
        parse_config(texts["ppo"], ["reference=null", "policy.model.path=org/name"])
    (problem,) = error.value.problems
    assert problem.startswith("policy.model: set exactly one of path")


def test_every_recipe_is_valid():
    names = set(recipes())
    assert names >= {
        "demo-sft", "demo-rm", "demo-ppo", "hh-rm", "hh-ppo", "qwen3-0.6b-1gpu", "llama-3-8b-8gpu", "llama-3-70b-4nodes",
        "serve",
    }  # fmt: skip
    for path in recipes().values():
        parse_config(path.read_text())


def test_a_file_beside_data_sets_takes_no_split_or_configuration_from_the_section():
    values = {"path": "org/name", "split": "train", "config": "main", "evaluation_path": "held_out.jsonl.gz"}
    data = DataConfig.model_validate(values)
    held_out = data.evaluation_file
    assert held_out is not None and (held_out.split, held_out.config) == (None, None)
    assert (data.files[""].split, data.files[""].config) == ("train", "main")
    several = {"sources": {"a": {"path": "a.csv"}, "b": {"path": "folder"}}, "split": "train"}
    files = DataConfig.model_validate(several).files
    assert [files[name].split for name in "ab"] == [None, "train"]
    alone = DataConfig.model_validate({"path": "a.csv", "split": "train"})
    assert alone.files[""].split == "train", "asked for by name, and refused when the file is read"
