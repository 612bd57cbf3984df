"""Write models as plain Hugging Face directories.

Invariants: transformers and vLLM read the directories without this project; if an architecture cannot be read so, a warning
says it. Weights are safetensors with the names that transformers uses. A score head is ``score.weight`` without bias, or the
layers ``score.0``, ``score.2`` ... of an MLP, unless the caller asks for another name. Everything that the model holds was
found in the files again, bit for bit, or an error names what was not. The config is the one that the model was read with, but
for the keys that docs/models.md lists.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ray.config.files.reward_record import KEY
from rlhf_ray.console import get_logger
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.actor import Actor
from rlhf_ray.models.disk_names import to_disk_names
from rlhf_ray.models.heads import MlpHead
from rlhf_ray.models.regression import SequenceRegression
from rlhf_ray.models.weights.adapters import PREFIX, adapter_name, replaced_by_adapter, tied_names
from rlhf_ray.models.weights.adapters import WEIGHTS as ADAPTER_WEIGHTS
from rlhf_ray.models.weights.checkpoint import HEAD_NAME
from rlhf_ray.models.weights.classification import classifier_name, reason_unreadable
from rlhf_ray.models.weights.held import GENERATION, config_as_read, held_tensors
from rlhf_ray.models.weights.lora import ADAPTER, adapted_layers
from rlhf_ray.models.weights.tokenizer import add_pad_token
from rlhf_ray.models.written import check_written, names_to_write
from rlhf_ray.storage import storage_errors

CONFIG = "config.json"


def save_pretrained(
    model: Actor | PreTrainedModel | SequenceRegression,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: str | Path,
    *,
    state: Mapping[str, Tensor] | None = None,
    metadata: Mapping[str, Any] | None = None,
    head_prefix: str = HEAD_NAME,
    max_shard_size: str = "5GB",
) -> None:
    """Write the whole model to ``directory``: weights, config, and the tokenizer if there is one.

    ``state`` holds the weights by their names on disk, if the model in memory does not hold them whole (ZeRO-3).
    ``metadata`` goes into config.json, such as ``mean`` and ``std`` of a reward model. ``head_prefix`` writes the head under
    another name, which OpenRLHF may need.
    """
    inner = model.model if isinstance(model, Actor) else model
    target = Path(directory)
    weights = dict(to_disk_names(inner) if state is None else state)
    expected = names_to_write(inner)
    if isinstance(inner, SequenceRegression):
        weights = {_rename_head(name, head_prefix): tensor for name, tensor in weights.items()}
        expected = {_rename_head(name, head_prefix) for name in expected}
        if head_prefix != HEAD_NAME:
            get_logger(__name__).warning(
                "the head is called %s: OpenRLHF and this project read it, plain transformers and vLLM look for %s",
                head_prefix,
                HEAD_NAME,
            )
        elif inner.value_head_prefix != HEAD_NAME:
            get_logger(__name__).warning(
                "the head is written as %s; OpenRLHF looks for it under %s, as config.json says: rlhf-ray export with "
                "--head-prefix %s writes it so",
                HEAD_NAME,
                inner.value_head_prefix,
                inner.value_head_prefix,
            )
        if tokenizer is not None and inner.config.get_text_config().pad_token_id is not None:
            add_pad_token(tokenizer)
    config = _make_config(inner, _stored_dtype(weights, f"{head_prefix}."), metadata or {}, head_prefix)
    generation = config_as_read(inner).generation if isinstance(inner, PreTrainedModel) else None
    whole = _apart({name: _copy_to_cpu(tensor) for name, tensor in weights.items()})
    with storage_errors(target, needed=_size(whole)):
        _write_texts(target, config, generation, tokenizer)
        save_torch_state_dict(whole, target, max_shard_size=max_shard_size, metadata={"format": "pt"})
    check_written(target, weights, expected)


def save_without_weights(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: str | Path,
    weights: Mapping[str, Tensor],
) -> None:
    """Write what :func:`save_pretrained` writes of a language model besides its weights.

    ``weights`` say by their names on disk of which dtypes these are; they may lie on the meta device.
    """
    target = Path(directory)
    config = _make_config(model, _stored_dtype(weights, f"{HEAD_NAME}."), {}, HEAD_NAME)
    with storage_errors(target):
        _write_texts(target, config, config_as_read(model).generation, tokenizer)


def _write_texts(
    target: Path,
    config: Mapping[str, Any],
    generation: Mapping[str, Any] | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    target.mkdir(parents=True, exist_ok=True)
    _write_json(target / CONFIG, config)
    if generation is not None:
        _write_json(target / GENERATION, generation)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)


def save_adapter(
    model: Actor | SequenceRegression,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: str | Path,
    *,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write only the adapter of ``model`` and its head, in the layout of PEFT; the base stays where it is.

    ``tensors`` holds whole parameters by their names in memory, if the model does not hold them whole (ZeRO-3). ``metadata``,
    such as ``mean`` and ``std`` of a reward model, goes into a config.json beside them, which this project reads.
    """
    inner = model.model if isinstance(model, Actor) else model.backbone
    if not adapted_layers(inner):
        raise ModelLoadError(f"this {type(inner).__name__} has no LoRA adapter to save: use save_pretrained")
    config: Any = deepcopy(inner.peft_config[ADAPTER])
    if not config.base_model_name_or_path:
        raise ModelLoadError(
            "the base of this adapter lies in no directory, so the adapter alone could not be loaded again: save the base "
            "first and load it from there, or use save_pretrained, which merges"
        )
    held = dict(held_tensors(model.model if isinstance(model, Actor) else model))
    names = {name: _name_in_adapter(model, name) for name in held if in_adapter(model, name)}
    whole = held if tensors is None else dict(tensors)
    state = {names[name]: _copy_to_cpu(tensor) for name, tensor in whole.items() if name in names}
    replaced, tied = replaced_by_adapter(inner), tied_names(inner)
    if tied is not None and replaced.intersection(tied):  # PEFT reads both, and ties no embedding of every architecture
        replaced |= set(tied)
        for one, other in (tied, tied[::-1]):
            if PREFIX + one in state:
                state.setdefault(PREFIX + other, state[PREFIX + one].clone())
    kept = sorted({name.rpartition(".")[0] for name in replaced})
    config.task_type, config.inference_mode, config.modules_to_save = "CAUSAL_LM", True, kept or None
    config.trainable_token_indices = None
    if isinstance(model, SequenceRegression):
        config.task_type, config.modules_to_save = "SEQ_CLS", [HEAD_NAME, *kept]
    target = Path(directory)
    with storage_errors(target, needed=_size(state)):
        target.mkdir(parents=True, exist_ok=True)
        config.save_pretrained(str(target))
        if isinstance(model, SequenceRegression):
            _write_json(target / CONFIG, _make_config(model, model.backbone.dtype, metadata or {}, HEAD_NAME))
        save_file(state, target / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        check_written(target, state, {*names.values(), *(PREFIX + name for name in replaced)})
        if tokenizer is not None:
            tokenizer.save_pretrained(target)


def in_adapter(model: Actor | SequenceRegression, name: str) -> bool:
    """Whether the tensor of this name in memory is saved with an adapter: LoRA, the head, or what an adapter brought whole."""
    if isinstance(model, SequenceRegression) and name.startswith(f"{model.value_head_prefix}."):
        return True
    return ".lora_" in name or name in replaced_by_adapter(model.model if isinstance(model, Actor) else model.backbone)


def _name_in_adapter(model: Actor | SequenceRegression, name: str) -> str:
    start = f"{model.value_head_prefix}." if isinstance(model, SequenceRegression) else None
    if start is not None and name.startswith(start):
        return f"{PREFIX}{HEAD_NAME}.{name.removeprefix(start)}"
    return adapter_name(name)


def _size(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    """Return the tensor on CPU, in memory of its own: safetensors refuses views, such as the experts of a layer."""
    whole = tensor.detach().to("cpu").contiguous()
    return whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()


def _apart(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors that share memory with another, of which the hub's library writes only one: buffers may, under two names."""
    seen: set[int] = set()
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.data_ptr() in seen:
            tensors[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return tensors


def _make_config(
    model: PreTrainedModel | SequenceRegression, dtype: torch.dtype, metadata: Mapping[str, Any], prefix: str
) -> dict[str, Any]:
    """Return the content of config.json: what the model was read with, and what describes the weights that are written."""
    inner = model.backbone if isinstance(model, SequenceRegression) else model
    config = config_as_read(inner).now(inner.config)
    config.pop("quantization_config", None)  # the weights are written dequantised
    _set_dtype(config, str(dtype).removeprefix("torch."))
    if isinstance(model, SequenceRegression):
        config |= _head_keys(model, config, prefix)
        if model.role == "critic":
            config.pop(KEY, None)  # it is of the reward model that the critic started from
    else:
        config["architectures"] = [type(model).__name__]
    if not type(model.config).__module__.startswith("transformers."):
        get_logger(__name__).warning(
            "%s has Python code of its own, which is not written: copy its *.py files beside the weights",
            config["architectures"][0],
        )
    return config | dict(metadata)


def _head_keys(model: SequenceRegression, config: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return what config.json says of a head with one output."""
    keys: dict[str, Any] = {
        "architectures": [_find_architecture(model)],
        "problem_type": "regression",
        "value_head_prefix": prefix if prefix != HEAD_NAME else model.value_head_prefix,
    }
    if len(config.get("id2label") or ()) != 1:
        keys |= {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    if "num_labels" in config:
        keys["num_labels"] = 1
    bias = config.get("score_bias", True)  # true and false say only whether the head has one (safe-rlhf)
    if not isinstance(bias, bool):
        keys["score_bias"] = 0.0  # of a head that a fresh one has replaced
    if model.score_bias:
        keys["score_bias"] = model.score_bias
        get_logger(__name__).warning(
            "the head has a bias of %.6g, kept as score_bias in config.json: plain transformers "
            "and vLLM read scores lower by it",
            model.score_bias,
        )
    return keys


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Set the dtype under the name that the config uses for it, and in the parts of a config that name one."""
    config["torch_dtype" if "torch_dtype" in config and "dtype" not in config else "dtype"] = dtype
    for name, part in config.items():
        if name.endswith("_config") and isinstance(part, dict):
            part |= {key: dtype for key in ("dtype", "torch_dtype") if part.get(key) is not None}


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", "utf-8")


def _rename_head(name: str, prefix: str) -> str:
    start = f"{HEAD_NAME}."
    return f"{prefix}.{name.removeprefix(start)}" if name.startswith(start) else name


def _stored_dtype(weights: Mapping[str, Tensor], head: str) -> torch.dtype:
    """Return the dtype of most numbers; the head, whose names begin with ``head``, and some buffers are always fp32."""
    numbers: Counter[torch.dtype] = Counter()
    for name, tensor in weights.items():
        if not name.startswith(head) and tensor.is_floating_point():
            numbers[tensor.dtype] += tensor.numel()
    return numbers.most_common(1)[0][0]


def _find_architecture(model: SequenceRegression) -> str:
    """Return the name of the class with which transformers reads this model; an MLP head keeps the name that it came with."""
    if isinstance(model.head, MlpHead):
        get_logger(__name__).warning(
            "the head is an MLP (%s), for which transformers and vLLM have no class: only this project reads it, and the code "
            "that the model came with",
            ", ".join(f"{HEAD_NAME}.{name}" for name, _ in model.head.named_parameters() if name.endswith("weight")),
        )
        own = (name for name in model.config.architectures or () if name.endswith("RewardModel"))
        return next(own, type(model.backbone).__name__)
    reason = reason_unreadable(model.config)
    if reason is not None:
        get_logger(__name__).warning("%s", reason)
    return classifier_name(model.config) or type(model.backbone).__name__
