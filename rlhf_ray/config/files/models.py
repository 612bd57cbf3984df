"""Whether the models that a config names lie where it says, with weights and a tokenizer.

Invariant: weights are seen to be there and never read; a missing ``org/name`` is taken for a hub id, and is not a problem.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_ray.config.files.adapters import why_refused
from rlhf_ray.config.files.config_values import readable, wrong_values
from rlhf_ray.config.files.positions import longest_rotated_alike, longest_sequence, text_part, too_long
from rlhf_ray.config.problems import Problem
from rlhf_ray.config.sections.models import MADE_SHAPES, MakeConfig, ModelConfig
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.environment import is_hub_id

ADAPTER_CONFIG = "adapter_config.json"
PICKLES = ("*.bin", "*.pt", "*.pth")
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spm.model", "sentencepiece.bpe.model",
)  # fmt: skip

OTHER_CACHES = frozenset(
    {"sliding_window", "layer_types", "kv_lora_rank", "attention_chunk_size", "multi_query", "num_kv_heads"}
)
"""Keys of a ``config.json`` of a model whose layers may keep less than the keys and values of all tokens, or of fewer heads
than ``num_key_value_heads`` says."""


def model_problems(key: str, model: ModelConfig, own_data: Collection[str]) -> Iterator[Problem]:
    """What is wrong with the model at ``key``; ``own_data`` are the paths of the job's rows, which are checked as such."""
    if model.make is not None and model.make.tokenizer_from not in own_data:
        yield from _made_problems(f"{key}.make.tokenizer_from", model.make)
    if model.path is None or is_hub_id(model.path):
        return
    path = Path(model.path)
    if not path.is_dir():
        yield f"{key}.path", _no_directory(path)
        return
    if is_adapter(path):
        yield from _adapter_problems(f"{key}.path", path)
    else:
        yield from ((f"{key}.path", text) for text in _checkpoint_problems(path))


def _made_problems(key: str, make: MakeConfig) -> Iterator[Problem]:
    if make.tokenizer_from != "world" and not Path(make.tokenizer_from).exists() and not is_hub_id(make.tokenizer_from):
        yield key, f"{make.tokenizer_from} does not exist: name a data file, world, or data for the job's own data"


def _no_directory(path: Path) -> str:
    if path.exists():
        return f"{path} is a file, but a model is a directory"
    trained = f"; it would be the result of run {path.parent.name}: train that first" if path.name == "final" else ""
    return f"{path} does not exist: name a model directory, or a hub id as org/name{trained}"


def _checkpoint_problems(path: Path) -> Iterator[str]:
    content = read_json(path / "config.json")
    if isinstance(content, str):
        yield content
    elif "model_type" not in content:
        yield f"{path / 'config.json'} names no model_type, so it is not the config of a model"
    else:
        yield from (f"{path}: {sentence}" for sentence in wrong_values(content))
    yield from _weight_problems(path)
    if not any((path / name).is_file() for name in TOKENIZER_FILES):
        yield f"{path} has no tokenizer.json: save the tokenizer beside the model"
    elif (path / "tokenizer.json").is_file():
        tokenizer = read_json(path / "tokenizer.json")
        if isinstance(tokenizer, str):
            yield tokenizer


def _weight_problems(path: Path) -> Iterator[str]:
    if any(path.glob("*.safetensors")):
        return
    pickles = sorted(file.name for pattern in PICKLES for file in path.glob(pattern))
    if pickles:
        yield f"{path} holds weights only as pickle ({pickles[0]}), which may run code: save them as safetensors"
    else:
        yield f"{path} holds no weights (*.safetensors)"


def _adapter_problems(key: str, path: Path) -> Iterator[Problem]:
    content = read_json(path / ADAPTER_CONFIG)
    if isinstance(content, str):
        yield key, content
        return
    base = str(content.get("base_model_name_or_path"))
    if not Path(base).is_dir() and not is_hub_id(base):
        yield key, f"{path} is an adapter of {base}, which does not exist on this machine"
    elif is_adapter(Path(base)) and not any(Path(base).glob("model*.safetensors*")):
        yield key, f"{path} is an adapter of {base}, which is an adapter itself: merge that first, with rlhf-ray export"
    refused = why_refused(content)
    if refused is not None:
        yield key, f"the adapter {path} {refused}"
    for text in _weight_problems(path):
        yield key, text


def read_json(path: Path) -> dict[str, Any] | str:
    """A JSON object, or what is wrong with the file."""
    if not path.is_file():
        return f"{path.parent} has no {path.name}: it is not a model directory"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        return f"{path}:{error.lineno}: not JSON: {error.msg}"
    except (OSError, ValueError, RecursionError) as error:
        return f"{path}: cannot be read: {error}"
    return content if isinstance(content, dict) else f"{path}: not a JSON object"


def model_config_file(model: ModelConfig) -> Mapping[str, Any]:
    """The ``config.json`` of a model on this machine, of its base if it is an adapter; empty where there is none to read.

    Nulls, and values of a kind that no model has, are left out: the rule about models names them.
    """
    path = model.path
    if path is not None and is_adapter(Path(path)):
        path = adapter_base(Path(path))
    content = read_json(Path(path) / "config.json") if path is not None else {}
    return readable(content) if isinstance(content, dict) else {}


def is_adapter(path: Path) -> bool:
    """Whether a directory holds an adapter."""
    return (path / ADAPTER_CONFIG).is_file()


def adapter_base(path: Path) -> str | None:
    """The path or hub id of the model that the adapter in a directory belongs to; None where it does not say."""
    content = read_json(path / ADAPTER_CONFIG)
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    return base if isinstance(base, str) else None


def length_problems(key: str, model: ModelConfig, longest_key: str, longest: int) -> Iterator[Problem]:
    """The longest sequence fits the positions that the model at ``key`` knows, as far as its directory is on this machine."""
    config = model_config_file(model)
    positions = longest_sequence(config)
    if positions is not None and longest > positions:
        yield longest_key, too_long(longest, f"{model.path} ({key})", positions, config)


def _shape(model: ModelConfig) -> Mapping[str, Any]:
    """The sizes of a model's layers, by their names in a ``config.json``; empty where they are not known here."""
    if model.make is None:
        return text_part(model_config_file(model))
    made = MADE_SHAPES[model.make.shape]
    return {
        "num_hidden_layers": made.layers,
        "num_attention_heads": made.heads,
        "num_key_value_heads": made.key_value_heads,
        "head_dim": made.head_dim,
        "intermediate_size": made.intermediate,
    }


def _cache_problems(rollout: RolloutConfig, config: Mapping[str, Any], name: str) -> Iterator[Problem]:
    """On CPU the KV cache of a vLLM engine holds one sequence of the longest length, or vLLM does not start.

    Only where every layer keeps keys and values of all tokens, so that what is needed is known.
    """
    if rollout.backend != "vllm" or rollout.resources.device != "cpu" or not OTHER_CACHES.isdisjoint(config):
        return
    heads = config.get("num_attention_heads")
    sizes = [config.get("num_hidden_layers"), config.get("num_key_value_heads", heads)]
    hidden = config.get("hidden_size")
    width = hidden // heads if isinstance(hidden, int) and isinstance(heads, int) and heads else None
    sizes.append(config.get("head_dim", width))
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return
    layers, key_heads, head_dim = (int(size) for size in sizes if size is not None)
    numbers = 2 * layers * head_dim * max(1, key_heads // rollout.tensor_parallel)
    needed = rollout.max_model_tokens * numbers * (4 if rollout.dtype == "fp32" else 2)
    if needed > rollout.kv_cache_gib * 2**30:
        least = -(-needed * 1000 // 2**30) / 1000
        yield (
            "rollout.kv_cache_gib",
            f"{rollout.kv_cache_gib:g}, but one sequence of rollout.max_model_tokens {rollout.max_model_tokens} takes "
            f"{needed / 2**30:.4g} GiB of it in {name}: raise it above {least:g}, or lower rollout.max_model_tokens",
        )


def _indivisible(config: Mapping[str, Any], parallel: int) -> Iterator[str]:
    """What of a model vLLM cannot cut into ``parallel`` equal parts, with its number. It pads a vocabulary itself."""
    heads, key_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if isinstance(heads, int) and heads % parallel:
        yield f"{heads} attention heads"
    elif isinstance(key_heads, int) and key_heads > 0 and key_heads % parallel and parallel % key_heads:
        yield f"{key_heads} heads of keys and values"
    experts = config.get("moe_intermediate_size")
    width = experts if isinstance(experts, int) else config.get("intermediate_size")
    if isinstance(width, int) and width % parallel:
        yield f"{width} inner units of {'an expert' if experts is width else 'a feed-forward layer'}"


def engine_problems(rollout: RolloutConfig, policy: ModelConfig) -> Iterator[Problem]:
    """The engines can hold the policy, as far as its directory is on this machine or it is made here."""
    shape = _shape(policy)
    name = policy.path or (policy.make.shape if policy.make is not None else "")
    for problem in _indivisible(shape, rollout.tensor_parallel):
        yield "rollout.tensor_parallel", f"{rollout.tensor_parallel} does not divide the {problem} of {name}"
    yield from _cache_problems(rollout, shape, name)
    yield from length_problems("policy.model", policy, "rollout.max_model_tokens", rollout.max_model_tokens)
    alike = longest_rotated_alike(model_config_file(policy))
    if alike is not None and rollout.max_model_tokens > alike and rollout.backend == "vllm":
        yield (
            "rollout.max_model_tokens",
            f"vLLM rotates all sequences alike, but RoPE of {policy.path} depends on the length beyond {alike} tokens, so that "
            f"its log-probs would not be the trainer's: lower it to {alike}",
        )
