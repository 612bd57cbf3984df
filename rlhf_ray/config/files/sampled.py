"""Which policies vLLM 0.32 samples from as transformers trains them, at start and after every update of their weights.

Invariant: an architecture that is refused here is refused by ``check`` and by the engine in the same words, and every other
mixture of experts that runs is right: ``tests/architectures`` tries them all on CPU. Each one whose routing is replayed is
tried in ``tests/models/test_routing.py``; others are refused by name. What is wrong on CPU alone is left to the self-check
of a run where engines have GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_ray.config.files.models import ADAPTER_CONFIG, is_adapter, model_config_file, read_json
from rlhf_ray.config.files.positions import text_part
from rlhf_ray.config.problems import Problem
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.rollout import RolloutConfig

NOT_SAMPLED: Mapping[str, frozenset[str]] = {
    "it does not read what transformers writes of this architecture": frozenset({"aria_text", "axk1", "phimoe"}),
}
"""Values of ``model_type`` that vLLM does not sample from on any device, by the reason."""
NOT_SAMPLED_ON_CPU: Mapping[str, frozenset[str]] = {
    "its router for CPU knows no bias and no sigmoid for experts that are in no groups": frozenset(
        {"ernie4_5_moe", "laguna", "minimax_m2", "minimax_m3_vl_text"}
    ),
    "it gives other log-probs than transformers on CPU": frozenset(
        {"apertus", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "jetmoe"}
    ),
}
"""Those that it samples wrong, or not at all, on CPU."""
NOT_TIED = frozenset({"glm4_moe", "olmoe"})
"""Those whose output layer vLLM does not tie to the embedding, although ``tie_word_embeddings`` of their config says so."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys that hold the number of experts of a layer."""
EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""Keys that hold how many of them a token is sent to."""
EXPERT_MULTIPLE = 32
"""vLLM's kernel for experts on CPU computes hidden sizes that are multiples of this. It pads the experts' own size itself."""
REPLAYED = (
    "afmoe", "aria_text", "axk1", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo",
    "glm4_moe", "glm4_moe_lite", "granitemoe", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "hy_v3",
    "laguna", "mellum", "minimax_m2", "minimax_m3_vl_text", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe", "solar_open",
)  # fmt: skip
"""Values of ``model_type`` that can be trained with the experts that the engine chose (``rollout.routing_replay``)."""
MOST_ADAPTER_RANK = 512
"""The largest rank of a LoRA adapter that vLLM takes."""
NO_ADAPTER = "adapter, but the policy trains all its weights: set policy.model.lora, or rollout.lora to merged"
SLIDES = "every layer slides its window, and vLLM on CPU forgets the experts of tokens that all windows have passed"
"""Why routing is not replayed in a model whose layers forget tokens."""
WAY_OUT = "Set rollout.backend to transformers, which samples with the trainer's own model"


def sampling_refusal(config: Mapping[str, Any], *, on_cpu: bool) -> str | None:
    """The sentence that refuses the model of a ``config.json`` for rollout in vLLM; None where nothing is known against it."""
    text = text_part(config)
    kinds = {config.get("model_type"), text.get("model_type")}
    for reason, refused in {**NOT_SAMPLED, **(NOT_SAMPLED_ON_CPU if on_cpu else {})}.items():
        for kind in kinds & refused:
            return f"vLLM does not sample from policies of type {kind}: {reason}. {WAY_OUT}"
    tied = text.get("tie_word_embeddings", config.get("tie_word_embeddings"))
    for kind in kinds & NOT_TIED if tied else ():
        return f"vLLM ties no output layer of type {kind} to its embedding, as tie_word_embeddings asks. {WAY_OUT}"
    hidden = text.get("hidden_size")
    if on_cpu and is_mixture(config) and isinstance(hidden, int) and hidden % EXPERT_MULTIPLE:
        return (
            f"vLLM's experts on CPU need a hidden size that is a multiple of {EXPERT_MULTIPLE}, and this model has {hidden}. "
            f"{WAY_OUT}"
        )
    return None


def adapter_refusal(config: Mapping[str, Any], rank: int) -> str | None:
    """The sentence that refuses to sample with an adapter of ``rank`` beside the model of a ``config.json``."""
    way_out = "set rollout.lora to merged"
    if rank > MOST_ADAPTER_RANK:
        return f"vLLM takes adapters up to rank {MOST_ADAPTER_RANK}, and this one has {rank}: lower it, or {way_out}"
    if is_mixture(config):
        return f"adapters beside the experts of a mixture are not supported: {way_out}"
    if text_part(config) != config:
        return f"adapters of a model with other parts than text are not supported: {way_out}"
    return None


def is_mixture(config: Mapping[str, Any]) -> bool:
    """Whether the model of a ``config.json`` is a mixture of experts."""
    text = text_part(config)
    return most(text, EXPERTS) > 1


def most(text: Mapping[str, Any], keys: Sequence[str]) -> int:
    """The largest number that a config has under one of ``keys``, each a number or a list with one for each layer; else 0."""
    values = [value for key in keys for value in (text[key] if isinstance(text.get(key), list) else [text.get(key)])]
    return max((value for value in values if isinstance(value, int)), default=0)


def sampling_problems(rollout: RolloutConfig, policy: ModelConfig) -> Iterator[Problem]:
    """What is known against sampling from ``policy`` in vLLM, as far as its directory is on this machine."""
    if rollout.backend != "vllm":
        return
    refused = sampling_refusal(model_config_file(policy), on_cpu=rollout.resources.gpus_per_rank == 0)
    if refused is not None:
        yield "rollout.backend", f"{policy.path}: {refused}"
    if rollout.lora == "adapter":
        yield from _adapter_problems(policy)


def _adapter_problems(policy: ModelConfig) -> Iterator[Problem]:
    config, rank = model_config_file(policy), None if policy.lora is None else policy.lora.rank
    if rank is None and policy.path is not None and is_adapter(Path(policy.path)):
        content = read_json(Path(policy.path) / ADAPTER_CONFIG)
        rank = content.get("r") if isinstance(content, dict) else None
    elif rank is None and (policy.path is None or config):
        yield "rollout.lora", NO_ADAPTER
    refused = adapter_refusal(config, rank) if isinstance(rank, int) else None
    if refused is not None:
        yield "rollout.lora", f"adapter, but {refused}"


def replay_problems(rollout: RolloutConfig, policy: ModelConfig) -> Iterator[Problem]:
    """What is known against replaying the routing of ``policy``, as far as its directory is on this machine."""
    content = model_config_file(policy)
    if not rollout.routing_replay or not (content or policy.make):
        return
    kinds = {content.get("model_type"), text_part(content).get("model_type")}
    if not is_mixture(content):
        yield (
            "rollout.routing_replay",
            f"true, but {policy.path or 'the made model'} is no mixture of experts: set it to false",
        )
    elif not kinds & set(REPLAYED):
        yield (
            "rollout.routing_replay",
            f"true, but the experts of a {content.get('model_type')} ({policy.path}) cannot be replayed, only those of "
            f"{', '.join(REPLAYED)}: set it to false",
        )
    elif rollout.backend == "vllm" and rollout.resources.gpus_per_rank == 0 and _slides_everywhere(text_part(content)):
        yield (
            "rollout.routing_replay",
            f"true, but in {policy.path} {SLIDES}: set it to false, or backend to transformers",
        )


def _slides_everywhere(text: Mapping[str, Any]) -> bool:
    if text.get("layer_types"):
        return set(text["layer_types"]) == {"sliding_attention"}
    return isinstance(text.get("sliding_window"), int) and text.get("use_sliding_window") is not False
