"""Writing plain Hugging Face directories.

Always true: transformers and vLLM read what is written here without this project (architectures that transformers
cannot map to sequence classification are said so); weights are safetensors under their names on disk; a score head is
``score.weight`` without bias unless another name is asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_ray.console import get_logger
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.actor import Actor
from rlhf_ray.models.disk_names import disk_names
from rlhf_ray.models.regression import SequenceRegression
from rlhf_ray.models.weights.adapters import PREFIX, adapter_name
from rlhf_ray.models.weights.adapters import WEIGHTS as ADAPTER_WEIGHTS
from rlhf_ray.models.weights.checkpoint import HEAD_NAME
from rlhf_ray.models.weights.classification import classifier_name, reason_unreadable
from rlhf_ray.models.weights.lora import ADAPTER, adapted_layers
from rlhf_ray.models.weights.tokenizer import add_pad_token


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
    """Write ``model`` to a directory.

    ``state`` are weights by their names on disk where the model itself does not hold them whole (ZeRO-3).
    ``metadata`` goes into the config: ``mean`` and ``std`` of a reward model. ``head_prefix`` writes the head under
    another name, for OpenRLHF.
    """
    inner = model.model if isinstance(model, Actor) else model
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    weights = dict(disk_names(inner) if state is None else state)
    if isinstance(inner, SequenceRegression):
        weights[f"{head_prefix}.weight"] = weights.pop(f"{HEAD_NAME}.weight")
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
        if tokenizer is not None and inner.config.pad_token_id is not None:
            add_pad_token(tokenizer)
    config = _config(inner, _dtype(weights, f"{head_prefix}.weight"), metadata or {}, head_prefix)
    config.save_pretrained(target)
    if isinstance(inner, PreTrainedModel) and inner.can_generate():
        inner.generation_config.save_pretrained(target)
    if tokenizer is not None:
        tokenizer.save_pretrained(target)
    whole = {name: _own(tensor) for name, tensor in weights.items()}
    save_torch_state_dict(whole, target, max_shard_size=max_shard_size, metadata={"format": "pt"})


def save_adapter(
    model: Actor | SequenceRegression,
    tokenizer: PreTrainedTokenizerBase | None,
    directory: str | Path,
    *,
    tensors: Iterable[tuple[str, Tensor]] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write only the adapter of ``model``, and its head, as PEFT does; the base stays where it is.

    ``tensors`` are whole parameters by their live names where the model itself does not hold them (ZeRO-3). ``metadata``
    (``mean`` and ``std`` of a reward model) lies beside them in a ``config.json``, which this project reads.
    """
    inner = model.model if isinstance(model, Actor) else model.backbone
    if not adapted_layers(inner):
        raise ModelLoadError(f"this {type(inner).__name__} has no LoRA adapter to save: use save_pretrained")
    config: Any = deepcopy(inner.peft_config[ADAPTER])
    if not config.base_model_name_or_path:
        raise ModelLoadError(
            "the base of this adapter lies in no directory, so an adapter alone could not be loaded again: save the base "
            "first and load it from there, or use save_pretrained, which merges"
        )
    whole = dict(
        (model.model if isinstance(model, Actor) else model).named_parameters() if tensors is None else tensors
    )
    state = {adapter_name(name): _own(tensor.detach()) for name, tensor in whole.items() if ".lora_" in name}
    config.task_type, config.inference_mode = "CAUSAL_LM", True
    if isinstance(model, SequenceRegression):
        config.task_type, config.modules_to_save = "SEQ_CLS", [HEAD_NAME]
        state[f"{PREFIX}{HEAD_NAME}.weight"] = _own(whole[f"{model.value_head_prefix}.weight"].detach())
    target = Path(directory)
    target.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(str(target))
    if isinstance(model, SequenceRegression):
        _config(model, model.backbone.dtype, metadata or {}, HEAD_NAME).save_pretrained(target)
    save_file(state, target / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    if tokenizer is not None:
        tokenizer.save_pretrained(target)


def _own(tensor: Tensor) -> Tensor:
    """Return a tensor on CPU that shares its memory with no other: experts are views of one tensor."""
    whole = tensor.detach().to("cpu").contiguous()
    return whole if whole.untyped_storage().nbytes() == whole.nbytes else whole.clone()


def _config(
    model: PreTrainedModel | SequenceRegression, dtype: torch.dtype, metadata: Mapping[str, Any], prefix: str
) -> Any:
    config = deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)  # what is written is dequantised
    config.dtype = str(dtype).removeprefix("torch.")
    if isinstance(model, SequenceRegression):
        config.architectures = [_architecture(model)]
        config.num_labels, config.problem_type = 1, "regression"
        config.value_head_prefix = prefix if prefix != HEAD_NAME else model.value_head_prefix
        if model.score_bias:
            config.score_bias = model.score_bias
            get_logger(__name__).warning(
                "the head has a bias of %.6g, kept as score_bias in config.json: plain transformers "
                "and vLLM read scores lower by it",
                model.score_bias,
            )
    else:
        config.architectures = [type(model).__name__]
    if not type(model.config).__module__.startswith("transformers."):
        get_logger(__name__).warning(
            "%s brings Python code of its own, which is not written: copy its *.py files beside the weights",
            config.architectures[0],
        )
    for name, value in metadata.items():
        setattr(config, name, value)
    return config


def _dtype(weights: Mapping[str, Tensor], head: str) -> torch.dtype:
    return next(tensor.dtype for name, tensor in weights.items() if name != head and tensor.is_floating_point())


def _architecture(model: SequenceRegression) -> str:
    """Name the class that transformers reads this as."""
    reason = reason_unreadable(model.config)
    if reason is not None:
        get_logger(__name__).warning("%s", reason)
    return classifier_name(model.config) or type(model.backbone).__name__
