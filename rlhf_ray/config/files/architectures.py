"""Which architectures the product runs, as far as a ``config.json`` tells.

Invariant: an architecture that is refused here is refused by a run in the same words, and every other one of transformers runs:
``tests/architectures`` tries them all. A name that is not known here is left to the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_ray.config.facts import Role
from rlhf_ray.config.files.encoders import encoder_type
from rlhf_ray.config.files.models import model_config_file
from rlhf_ray.config.files.positions import longest_rotated_alike, text_part
from rlhf_ray.config.problems import Problem, unless_absent
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import ScoringRole

RUN_LAYERS = {"attention", "full_attention", "sliding_attention"}
"""Types of layers, as a config.json names them, that run packed."""
NOT_RUN: Mapping[str, frozenset[str]] = {
    "its attention does not go through transformers' attention interface": frozenset(
        {
            "biogpt", "bloom", "blt", "codegen", "cpmant", "ctrl", "diffllama", "doge", "falcon", "git", "gpt_neo",
            "gpt_neox_japanese", "gptj", "inkling_text", "longcat_flash", "mpt", "nemotron", "openai-gpt", "stablelm", "xglm",
        }
    ),
    "its attention uses sinks": frozenset({"gpt_oss", "granite_swa", "granitemoe_swa", "mimo_v2_flash"}),
    "its layers choose the tokens that they attend to": frozenset(
        {"axk2", "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "hy_v4"}
    ),
    "its layers attend to chunks of the text": frozenset({"llama4", "llama4_text"}),
    "some of its layers keep a state or convolve instead of attending": frozenset(
        {
            "bamba", "falcon_h1", "falcon_mamba", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "mamba", "mamba2", "minimax",
            "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next",
            "qwen4_exp", "qwen4_exp_text", "recurrent_gemma", "rwkv", "xlstm", "zamba", "zamba2", "zaya",
        }
    ),
    "it has an encoder and a decoder": frozenset(
        {
            "bart", "bigbird_pegasus", "blenderbot", "blenderbot-small", "marian", "mbart", "moshi", "mt5", "musicgen",
            "musicgen_melody", "mvp", "pegasus", "plbart", "prophetnet", "t5", "t5gemma", "t5gemma2", "trocr", "umt5",
            "whisper",
        }
    ),
    "it is no language model that reads a text alone from its beginning to its end": frozenset(
        {
            "bert-generation", "canine", "cohere_compass_text", "emu3", "esm", "esmc", "flaubert", "fuyu", "gemma4_assistant",
            "gemma4_unified_assistant", "got_ocr2", "layoutlm", "layoutlmv2", "layoutlmv3", "lilt", "luke", "markuplm",
            "mllama", "modernvbert", "perceiver", "reformer", "tapas", "xlm", "xlnet",
        }
    ),
    "its score head is more than layers behind one token": frozenset({"modernbert-decoder"}),
    "its layers shorten the text as it passes them": frozenset({"funnel"}),
    "its layers compute in integers of their own": frozenset({"ibert"}),
    "transformers builds it only with the package timm": frozenset({"gemma3n"}),
    "transformers does not build it from its config": frozenset({"dbrx"}),
}  # fmt: skip
"""Values of ``model_type`` that do not run, by the reason."""
READS_WEIGHTS = frozenset({"gemma3n_text"})
"""Architectures that read the weights of some linear layers beside calling them, so that an adapter on these is left out."""
NO_CHECKPOINTING = frozenset({"jetmoe"})
"""Architectures whose layers transformers does not recompute in the backward pass."""
SERVED_BY_VLLM = frozenset({"falcon", "gpt_oss", "gptj", "nemotron", "stablelm"})
"""Those of them that vLLM's pooling runner scores right."""
NOT_IN_VLLM = frozenset(
    {
        "axk1", "biogpt", "bloom", "ctrl", "deepseek_v2", "deepseek_v3", "diffllama", "doge", "gemma3_text", "gpt_neo",
        "helium", "jetmoe", "minicpm3", "minimax", "ministral", "mistral4", "modernbert-decoder", "mpt", "persimmon", "phimoe",
        "xlnet",
    }
)  # fmt: skip
"""Architectures of reward models that vLLM's pooling runner does not read, or scores wrong."""
HEAD = "ForSequenceClassification"
"""The end of an architecture's name that vLLM takes for a reward model."""
SCORING = (HEAD, "ForTokenClassification", "RewardModel")
"""Ends of the names of architectures that score texts."""
LOGIT_SCALES = ("logit_scale", "logits_scaling")
"""Keys of the number by which a language model multiplies or divides its logits behind the output layer."""
COHERES_SCALE = 0.0625
"""What it is for Cohere's models whose config.json has none."""
OTHERWISE = "or set scorer to packed"


def reason_not_run(config: Mapping[str, Any]) -> str | None:
    """Why the model of a ``config.json`` does not run packed; None where nothing is known against it."""
    text = text_part(config)
    types = [config.get("model_type"), text.get("model_type")]
    for reason, refused in NOT_RUN.items():
        for kind in types:
            if kind in refused:
                return f"a {kind} model does not run packed: {reason}"
    layers = text.get("layer_types")
    others = sorted(set(map(str, layers if isinstance(layers, list) else [])) - RUN_LAYERS)
    if others:
        return f"it has layers of type {', '.join(others)}, and packs support {', '.join(sorted(RUN_LAYERS))}"
    return None


def refusal(config: Mapping[str, Any], *, scores: bool) -> str | None:
    """The sentence that refuses a model; ``scores`` says that it only scores, which vLLM may do instead."""
    reason = reason_not_run(config)
    if reason is None:
        return None
    served = scores and SERVED_BY_VLLM.intersection({config.get("model_type"), text_part(config).get("model_type")})
    return f"{reason}. {'Set scorer to vllm, which scores it' if served else 'Choose another model'}"


def vllm_refusal(config: Mapping[str, Any], max_tokens: int) -> str | None:
    """The sentence that refuses a model, with items of ``max_tokens`` at most, for vLLM's pooling runner."""
    kind = text_part(config).get("model_type")
    if kind in NOT_IN_VLLM:
        instead = "set scorer to packed" if reason_not_run(config) is None else "choose another model"
        return f"vLLM's pooling runner does not score a {kind} reward model as transformers does: {instead}"
    architecture = (config.get("architectures") or [HEAD])[0]
    if not architecture.endswith(HEAD):
        return not_one_score(architecture)
    alike = longest_rotated_alike(config)
    if alike is not None and max_tokens > alike:
        return (
            f"vLLM rotates all items alike, but RoPE of this model depends on the length beyond {alike} tokens: lower "
            f"max_tokens (now {max_tokens}) to that, {OTHERWISE}"
        )
    return None


def not_one_score(what: str) -> str:
    """The sentence that refuses a model that vLLM does not take for a reward model."""
    return (
        f"it holds {what}: vLLM's pooling runner reads reward models of ...{HEAD} with one output; write one with rlhf-ray "
        f"export, {OTHERWISE}"
    )


def architecture_problems(key: str, role: Role, max_tokens: int) -> Iterator[Problem]:
    """What is known against the architecture of the model at ``key``, whose items have ``max_tokens`` at most."""
    model: ModelConfig | None = unless_absent(lambda: role.config.model, None)
    if model is None or encoder_type(model_config_file(model)) is not None:
        return  # ``encoders.py`` knows these
    config, runner = model_config_file(model), role.config
    in_vllm = isinstance(runner, ScoringRole) and runner.scorer == "vllm"
    if in_vllm:
        problem = vllm_refusal(config, max_tokens)
    else:
        problem = quantized(config) or refusal(config, scores=isinstance(runner, ScoringRole))
        problem = problem or (only_scores(config) or scaled_logits(config) if role.head is False else None)
    kind = text_part(config).get("model_type")
    if model.lora is not None and model.lora.targets == "all-linear" and kind in READS_WEIGHTS:
        yield (
            f"{key}.model.lora.targets",
            f"all-linear holds layers of a {kind} model that are read beside their adapters: name layers, such as "
            "[q_proj, k_proj, v_proj, o_proj]",
        )
    if model.gradient_checkpointing and kind in NO_CHECKPOINTING:
        yield f"{key}.model.gradient_checkpointing", f"transformers has none for {kind} models: set it to false"
    if problem is not None:
        yield f"{key}.scorer" if in_vllm else f"{key}.model.path", f"{model.path}: {problem}"


def only_scores(config: Mapping[str, Any]) -> str | None:
    """The sentence that refuses a reward model where a text is to be written.

    Its output layer is missing: transformers would make one anew, at random, and say so in a log alone.
    """
    architecture = str((config.get("architectures") or [""])[0])
    if not architecture.endswith(SCORING):
        return None
    return f"it holds {architecture}, which scores texts and writes none: name a language model, such as a policy after sft"


def scaled_logits(config: Mapping[str, Any]) -> str | None:
    """The sentence that refuses a policy whose logits are not those of its output layer."""
    text = text_part(config)
    implied = {"logit_scale": COHERES_SCALE} if str(text.get("model_type")).startswith("cohere") else {}
    scales = {name: value for name, value in (implied | dict(text)).items() if name in LOGIT_SCALES and value != 1}
    if not scales:
        return None
    name, value = next(iter(scales.items()))
    return f"it scales its logits behind the output layer ({name} {value}), which a policy here cannot: choose another model"


def quantized(config: Mapping[str, Any]) -> str | None:
    """The sentence that refuses weights that are quantised already."""
    method = (config.get("quantization_config") or {}).get("quant_method")
    if not config.get("quantization_config"):
        return None
    return (
        f"it holds weights that are quantised already ({method}), which is not supported: give the model in bf16, and set "
        "quantization to nf4 to quantise it here"
    )
