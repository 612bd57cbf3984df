"""What of its config a run may change when it is resumed.

Invariants: every key of every job that trains has one rule here; a key without one may not change. What may not change is
refused by its name with both values and the way out, and every change that is made is a :class:`Change` that the run records.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_ray.config.jobs.base import TrainingJob
from rlhf_ray.config.keys import entries_of, join
from rlhf_ray.config.sections.base import Section
from rlhf_ray.config.sections.reward_training import RewardTrainingRole
from rlhf_ray.config.writing import write_value

NAME = "NAME"
"""Stands in the table for the names of sources and of terms of a mixture."""


@dataclass(frozen=True)
class Rule:
    """Whether a key may change.

    ``free``: it may, and what is learned stays the same but for rounding. ``said``: it may, and ``text`` says what follows.
    ``content``: it names a file or a model, which may lie elsewhere if its content is the same. ``fixed``: it may not, and
    ``text`` says why and what to do.
    """

    kind: Literal["free", "said", "content", "fixed"]
    text: str = ""


@dataclass(frozen=True)
class Change:
    """A key whose value differs: ``before`` and ``after`` are plain JSON, null where a section is not there."""

    key: str
    before: Any
    after: Any
    rule: Rule

    def __str__(self) -> str:
        """As messages and ``status`` show it."""
        return f"{self.key}: {write_value(self.before)} -> {write_value(self.after)}"

    def to_json(self) -> dict[str, Any]:
        """As it stands in ``attempts.jsonl``."""
        return {"key": self.key, "from": self.before, "to": self.after}


FREE = Rule("free")
CONTENT = Rule("content")
LENGTH = Rule("said", "the schedule of the learning rate, warm-up included, spans the new length from here on")
RATE = Rule("said", "updates from here on have the rate of the new schedule at their place in the whole run")
CLIPPED = Rule("said", "gradients are clipped at the new norm from here on")
BATCH = Rule("said", "the steps from here on have the new size; the order of the rows goes on where it was")
REWARD = Rule(
    "said", "rewards from here on are not comparable with those before, nor is the start that evaluation shows"
)
SAMPLING = Rule("said", "answers from here on are sampled otherwise than those before, and than those of the start")
MODE = Rule("said", "answers from here on are as old as the new mode makes them")
COMPARED = Rule("said", "figures from here on are of the prompts that the starting policy answered too")
ROUNDING = Rule("said", "the rounding is another from here on")
ROUTING = Rule("said", "log-probs from here on are of other experts, where engine and trainer choose differently")
REPEATS = Rule("said", "only what follows repeats exactly, or no longer does")

PLACE = Rule("fixed", "it is where the run lies: move the directory, and resume it there")
SEED = Rule("fixed", "the order of the rows and every sample follow from it: start a new run")
METHOD = Rule("fixed", "one run is one method: start a new run, whose model begins at final/ of this one")
ROWS = Rule("fixed", "the run continues an order of the rows that it has chosen by it: start a new run")
SHAPE = Rule("fixed", "the checkpoint holds a model that was made by it: start a new run")
SHARDS = Rule("fixed", "the shards of each checkpoint were made by it: resume with the value of the run")
STATE = Rule("fixed", "the checkpoint holds the optimizer's state with it: resume with the value of the run")
KEPT_START = Rule("fixed", "the answers of the starting policy are kept as it says: start a new run")


def _same(rule: Rule, *names: str) -> dict[str, Rule]:
    return dict.fromkeys(names, rule)


_MODEL = {
    **_same(CONTENT, "path", "revision"),
    **_same(SHAPE, "make", "dtype", "lora", "quantization", "trust_remote_code", "head_init", "replace_head",
            "value_head_prefix"),
    **_same(ROUNDING, "attention", "head_dtype"),
    "gradient_checkpointing": FREE,
}  # fmt: skip
_OPTIMIZER = {
    **_same(
        RATE, "learning_rate", "schedule", "warmup_fraction", "final_fraction", "restarts", "power", "decay_fraction"
    ),
    **_same(STATE, "betas", "eps", "weight_decay"),
    "max_grad_norm": CLIPPED,
}
_MADE = {**_same(SHAPE, "shape", "vocabulary", "seed"), "tokenizer_from": CONTENT}
_LORA = _same(SHAPE, "rank", "alpha", "dropout", "targets")
_PLACEMENT = _same(FREE, "strategy", "labels", "resource")
_RESOURCES = _same(FREE, "cpus_per_rank", "gpus_per_rank", "threads_per_rank")
_FROZEN_MODEL = {**_MODEL, **_same(ROUNDING, "dtype", "quantization")}
_FROZEN_ENGINE = {**_same(FREE, "zero", "offload"), "optimizer": STATE}
_OVERLONG = _same(METHOD, "buffer_fraction", "penalty")
_SCORING = {
    **_same(FREE, "ranks", "max_tokens_per_micro_batch", "timeout_s", "samples_per_call", "token_file"),
    **_same(
        REWARD,
        "model",
        "scorer",
        "form",
        "scored_token",
        "function",
        "url",
        "source",
        "parameters",
        "judge",
        "ensemble",
        "reduction",
        "k",
        "normalize",
    ),
}
_SCORING_MODEL = {
    **_same(REWARD, "path", "revision", "make", "dtype", "attention", "lora", "quantization", "trust_remote_code",
            "head_dtype", "head_init", "replace_head", "value_head_prefix"),
    "gradient_checkpointing": FREE,
}  # fmt: skip

RULES: Mapping[str, Mapping[str, Rule]] = {
    "": {"kind": METHOD, "steps": LENGTH, "epochs": LENGTH, "save": FREE, "critic": METHOD, "reference": METHOD,
         "expose": FREE},
    "run": {"name": PLACE, "root": PLACE, "seed": SEED, "deterministic": REPEATS,
            **_same(FREE, "max_consecutive_skips", "max_restarts", "max_group_restarts", "stall_floor_s", "stop_grace_s")},
    "cluster": _same(FREE, "address", "num_cpus", "object_store_mb", "dashboard", "colocate", "placement_timeout_s",
                     "start_timeout_s", "call_timeout_s"),
    "guards": _same(FREE, "loss", "gradient_norm", "kl_above", "window", "budget", "on_budget", "max_going_back"),
    "checkpoint": _same(FREE, "every_steps", "keep", "background"),
    "monitoring": _same(FREE, "ray_metrics", "trackers", "project", "track_live", "samples_per_log", "spans", "open_telemetry"),
    "evaluation": {
        **_same(FREE, "every_steps", "keep_best", "worst_pairs", "samples_shown", "pass_at"),
        "prompts": COMPARED,
        **_same(KEPT_START, "samples_per_prompt", "greedy", "gold", "best_of"),
    },
    "batch": {
        **_same(BATCH, "prompts_per_step", "samples_per_prompt", "sequences_per_update", "passes_per_step",
                "pairs_per_update", "answers_per_update"),
        **_same(FREE, "max_tokens_per_micro_batch", "forward_factor"),
    },
    "data": {
        **_same(CONTENT, "path", "evaluation_path"),
        **_same(ROWS, "world", "sources", "split", "config", "evaluation_split", "evaluation_fraction", "shared_prompts",
                "ignore_columns", "rename_columns", "ratings", "prompt_in_sides", "bad_rows", "prompt_key", "answer_key",
                "chosen_key", "rejected_key", "label_key", "train_on", "apply_chat_template", "template_variables",
                "max_tokens", "too_long", "max_prompt_tokens", "max_rows"),
        "cache": FREE,
    },
    "data.world": _same(ROWS, "seed", "task", "raters", "demonstrations", "pairs", "evaluation_pairs", "prompts",
                        "evaluation_prompts"),
    "data.sources.NAME": {
        "path": CONTENT,
        **_same(ROWS, "split", "config", "weight", "prompt_key", "answer_key", "chosen_key", "rejected_key", "label_key"),
    },
    "loss": _same(METHOD, "name", "label_smoothing", "centering", "router_balance", "hinge_margin", "focal_gamma",
                  "thresholds", "beta", "length_normalised", "simpo_gamma", "desirable_weight", "undesirable_weight",
                  "temperature", "likelihood"),
    "teacher": _FROZEN_MODEL,
    "teacher.make": _MADE,
    "teacher.lora": _LORA,
    "normalization": {"over": FREE, "demonstrations_path": CONTENT},
    "TRAINED": {"ranks": ROUNDING, "max_tokens_per_micro_batch": FREE},
    "TRAINED.model": _MODEL,
    "TRAINED.model.make": _MADE,
    "TRAINED.model.lora": _LORA,
    "TRAINED.engine": {"zero": SHARDS, "offload": SHARDS, "optimizer": STATE},
    "TRAINED.engine.optimizer": _OPTIMIZER,
    "TRAINED.resources": _RESOURCES,
    "TRAINED.placement": _PLACEMENT,
    "reference": {"ranks": FREE, "max_tokens_per_micro_batch": FREE},
    "reference.model": _FROZEN_MODEL,
    "reference.model.make": _MADE,
    "reference.model.lora": _LORA,
    "reference.engine": _FROZEN_ENGINE,
    "reference.engine.optimizer": _OPTIMIZER,
    "reference.resources": _RESOURCES,
    "reference.placement": _PLACEMENT,
    "SCORING": {**_SCORING, **_same(REWARD, "mixture", "weight", "gate", "floor", "steps"),
                **_same(FREE, "on_failure", "hold_s", "max_dropped_share")},
    "SCORING.model": _SCORING_MODEL,
    "SCORING.model.make": _same(REWARD, "shape", "tokenizer_from", "vocabulary", "seed"),
    "SCORING.model.lora": _same(REWARD, "rank", "alpha", "dropout", "targets"),
    "SCORING.judge": {
        **_same(REWARD, "url", "model", "rubric", "parts", "reference", "scale", "floor", "compare", "ranking", "both_orders",
                "temperature", "max_answer_tokens", "parameters"),
        **_same(FREE, "key_variable", "limit_field", "concurrency", "tries", "max_requests", "max_tokens", "max_cost",
                "prompt_price", "reply_price"),
    },
    "SCORING.judge.parts.NAME": _same(REWARD, "asks", "weight", "gate"),
    "SCORING.engine": _FROZEN_ENGINE,
    "SCORING.engine.optimizer": _OPTIMIZER,
    "SCORING.resources": _RESOURCES,
    "SCORING.placement": _PLACEMENT,
    "rollout": {
        **_same(SAMPLING, "max_new_tokens", "stop_tokens", "temperature", "top_p", "top_k", "min_p", "max_model_tokens"),
        "routing_replay": ROUTING,
        **_same(ROUNDING, "backend", "dtype", "max_num_seqs", "max_num_batched_tokens", "tensor_parallel"),
        **_same(MODE, "mode", "window", "partial"),
        "environment": REWARD,
        **_same(FREE, "engines", "max_restarts", "kv_cache_gib", "gpu_memory_utilization", "weight_transport",
                "weight_delta", "sleep", "timeout_s", "update_timeout_s"),
        **_same(ROUNDING, "lora"),
    },
    "rollout.environment": {**_same(REWARD, "name", "parameters", "max_turns"), "timeout_s": FREE},
    "rollout.resources": _RESOURCES,
    "rollout.placement": _PLACEMENT,
    "algorithm": _same(METHOD, "name", "advantages", "gamma", "lam", "whitening", "objective", "ratio", "aggregation",
                       "clip_low", "clip_high", "dual_clip", "value_clip", "entropy_coefficient", "mask_truncated",
                       "dynamic_sampling", "collector", "old_log_probs", "critic_warmup_steps", "max_staleness"),
    "algorithm.parameters": _same(METHOD, "objective", "advantages", "collector"),
    "algorithm.kl": _same(METHOD, "coefficient", "estimator", "applied_to", "gradient", "target", "horizon", "measure"),
    "algorithm.shaping": _same(METHOD, "normalize", "scale", "clip", "overlong", "too_short", "missing_eos", "placement",
                               "whitening"),
    "algorithm.shaping.overlong": _OVERLONG,
    "algorithm.shaping.too_short": _same(METHOD, "tokens", "penalty"),
    "algorithm.shaping.missing_eos": _same(METHOD, "rule", "value"),
    "algorithm.importance": _same(METHOD, "level", "rule", "low", "high", "gating"),
    "expose": _same(FREE, "host", "port", "token_file", "normalize", "requests_per_minute", "max_batch_tokens", "max_items",
                    "max_queue_items", "max_queue_tokens", "max_body_bytes", "max_bodies_bytes", "header_timeout_s",
                    "body_timeout_s", "write_timeout_s", "trusted_proxies", "hold_s", "tracing", "page"),
}  # fmt: skip
"""The rule of each key, by its section. ``TRAINED`` is a role that learns (``policy``, ``critic``, and ``reward`` of a reward
model's own job), ``SCORING`` a place that rewards come from (``reward``, ``reward.mixture.NAME``)."""
UNKNOWN = Rule("fixed", "nothing is known of what follows from it: start a new run")
"""The rule of keys that kinds of jobs have which are not this project's."""


def compare(old: TrainingJob, new: TrainingJob) -> list[Change]:
    """Every key whose value differs between the config of a run and the one that it is to go on with."""
    return list(_compare(old, new, "", ""))


def refusals(changes: Sequence[Change]) -> list[str]:
    """One sentence for each of ``changes`` that may not be made."""
    return [
        f"{change.key}: it is {write_value(change.before)} in this run and cannot become {write_value(change.after)}: "
        f"{change.rule.text}"
        for change in changes
        if change.rule.kind == "fixed"
    ]


def section_in_table(section: type[Section], pattern: str) -> str:
    """The name under which the table has the keys of a section at ``pattern``, a dotted key with ``NAME`` for own names."""
    if pattern in ("policy", "critic") or issubclass(section, RewardTrainingRole):
        return "TRAINED"
    for place in (f"reward.mixture.{NAME}", "reward"):
        if pattern in (place, f"{place}.judge.parts.{NAME}"):
            return pattern.replace(place, "SCORING", 1)
    return pattern


def _compare(old: Section, new: Section, at: str, table: str) -> Iterator[Change]:
    for name, info in type(old).model_fields.items():
        key, before, after = join(at, name), getattr(old, name), getattr(new, name)
        rule = RULES.get(table, {}).get(name, UNKNOWN)
        if isinstance(before, Section) and isinstance(after, Section):
            yield from _compare(before, after, key, section_in_table(type(before), join(table, name)))
        elif entries_of(info.annotation) is not None:
            yield from _compare_entries(before, after, key, rule, join(join(table, name), NAME))
        elif before != after:
            comes_or_goes = key == "data.evaluation_path" and None in (before, after)
            yield Change(key, _plain(before), _plain(after), ROWS if comes_or_goes else rule)


def _compare_entries(
    old: Mapping[str, Section], new: Mapping[str, Section], at: str, rule: Rule, pattern: str
) -> Iterator[Change]:
    """The entries of a mapping by names; one that comes or goes has the rule of the mapping."""
    pattern = pattern.replace("SCORING.", "reward.")
    for name in {**old, **new}:
        key, before, after = join(at, name), old.get(name), new.get(name)
        if before is not None and after is not None:
            yield from _compare(before, after, key, section_in_table(type(before), pattern))
        else:
            yield Change(key, _plain(before), _plain(after), rule)


def _plain(value: Any) -> Any:
    if isinstance(value, Section):
        return value.model_dump(mode="json")
    return list(value) if isinstance(value, tuple) else value
