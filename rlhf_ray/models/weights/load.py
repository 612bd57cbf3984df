"""Load transformers models and make them ready to run on packs.

Invariants: every weight of a loaded model came from its checkpoint; missing weights, and weights of another shape, are
errors, although transformers would draw new ones. Dropout is off. The attention backend can run packs, which is checked at
once with short sequences, two of which share a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from rlhf_ray.config.files.architectures import only_scores, refusal
from rlhf_ray.console import get_logger, stderr
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.forward.attention_backends import REGISTERED, choose_backend
from rlhf_ray.models.forward.log_probs import LogProbHead
from rlhf_ray.models.forward.packed import check_packable, packed_forward, try_narrowing
from rlhf_ray.models.forward.rotation import rotate_by_sequence, share_alike
from rlhf_ray.models.forward.shards import in_shards
from rlhf_ray.models.weights.adapter_modules import replace_modules
from rlhf_ray.models.weights.checkpoint import IN_LAYERS, NOT_BUILT, Checkpoint
from rlhf_ray.models.weights.embeddings import input_embedding
from rlhf_ray.models.weights.held import keep_config, refuse_extra_state
from rlhf_ray.models.weights.quantization import four_bit, prepare_four_bit
from rlhf_ray.models.weights.sharded import load_in_shards, wants_shards
from rlhf_ray.trajectories.packing import Packed

AGREES_TO = {torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 0.2}
"""Largest relative difference between packed and ordinary outputs that passes the check. A model that mixes segments differs
by about 1. In half precision the difference is large at times: a router may send a token to another expert."""
JITTER = {"input_jitter_noise", "jitter_noise"}
"""What transformers calls the noise that it multiplies the input of experts with in training."""
DRAWING_ROUTERS = {"PhimoeTopKRouter"}
ATTENTION_MASKS = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
"""How the names of masks end that older versions of transformers wrote with the layers."""
ALIGNMENT = 64
"""Bytes to which torch aligns the memory that it allocates on CPU."""


def load_weights(
    auto: type[AutoModel] | type[AutoModelForCausalLM] | type[AutoModelForSequenceClassification],
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    *,
    heads: Collection[str] = (),
    ds_config: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    device_map: Any = None,
    trust_remote_code: bool = False,
    load_in_4bit: bool = False,
) -> PreTrainedModel:
    """Load a checkpoint into the class that ``auto`` chooses for it.

    ``heads`` names tensors of the checkpoint that are read elsewhere, so it is expected that the model leaves them
    out. The whole model lies on ``device``; without one ``device_map`` says where, as in transformers. If ``ds_config`` asks
    for ZeRO-3, the model is built in shards, on all ranks together, and lies where DeepSpeed puts it.
    """
    quantized: dict[str, Any] = {}
    if load_in_4bit:
        quantized = {"quantization_config": four_bit(dtype, in_shards=wants_shards(ds_config))}
    config = checkpoint.config(trust_remote_code=trust_remote_code)
    if ds_config is not None and wants_shards(ds_config):
        sharded = load_in_shards(auto, checkpoint, dtype, ds_config, device=device, trust_remote_code=trust_remote_code)
        return _finish(sharded, checkpoint, config)
    if device is not None and (
        device.type != "cpu" or load_in_4bit
    ):  # to 4 bits transformers would use any GPU it sees
        device_map = {"": device}
    try:
        with _quiet_transformers():
            loaded: Any = auto.from_pretrained(
                checkpoint.directory,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # then transformers reports them, and _check_info refuses them by name
                device_map=device_map,
                trust_remote_code=trust_remote_code,
                **quantized,
            )
    except (*NOT_BUILT, RuntimeError, ImportError) as error:
        raise ModelLoadError(f"{checkpoint.directory} cannot be loaded: {str(error).strip()}") from error
    model: PreTrainedModel
    model, info = loaded
    _check_info(checkpoint, type(model).__name__, info, heads)
    _align(model)
    if load_in_4bit:
        prepare_four_bit(model)
    return _finish(model, checkpoint, config)


def _finish(model: PreTrainedModel, checkpoint: Checkpoint, config: PreTrainedConfig) -> PreTrainedModel:
    """Remember config.json as it stands, and put in what an adapter trained whole.

    Of a model that is only a part of what config.json describes, the config in memory is remembered.
    """
    keep_config(model, checkpoint.raw_config() if type(model.config) is type(config) else None, checkpoint.directory)
    if checkpoint.adapter is not None:
        replace_modules(model, checkpoint.adapter)
    return model


def _align(model: PreTrainedModel) -> None:
    """Move weights on CPU to memory that torch allocates.

    Weights read from a file may start at any byte. Matrix products give other last digits for another alignment, so that
    scores of a model would change when it is saved and loaded.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' report on loading, which one line replaces here; outside of a terminal, its progress bar too."""
    verbosity = transformers_logging.get_verbosity()
    bar = transformers_logging.is_progress_bar_enabled() and not stderr.is_terminal
    transformers_logging.set_verbosity_error()
    if bar:
        transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()


def _check_info(checkpoint: Checkpoint, model: str, info: dict[str, Any], heads: Collection[str]) -> None:
    missing, mismatched = sorted(info["missing_keys"]), sorted(map(str, info["mismatched_keys"]))
    if missing or mismatched or info["error_msgs"]:
        problems = "; ".join(
            f"{what}: {', '.join(names[:4])}{' ...' if len(names) > 4 else ''}"
            for what, names in (("missing", missing), ("of another shape", mismatched), ("errors", info["error_msgs"]))
            if names
        )
        raise ModelLoadError(
            f"{checkpoint.directory} does not hold the weights of a {model} ({problems}): it is another kind of model"
        )
    unread = sorted(set(info["unexpected_keys"]) - set(heads))
    trained = [name for name in unread if IN_LAYERS.search(f".{name}") and name.endswith((".weight", ".bias"))]
    trained = [name for name in trained if not name.endswith(ATTENTION_MASKS)]
    if trained:
        get_logger(__name__).warning(
            "%s holds %d tensors of layers for which a %s has no place with this config.json (num_hidden_layers, biases), such "
            "as %s: they are not read, and are not in what is written. If they were trained, correct config.json",
            checkpoint.directory, len(trained), model, ", ".join(trained[:4]),
        )  # fmt: skip
    elif unread:
        get_logger(__name__).info(
            "%s does not use %d tensors of %s: %s", model, len(unread), checkpoint.directory, ", ".join(unread[:4])
        )


def refuse_what_does_not_run(checkpoint: Checkpoint, *, scores: bool, writes: bool = False) -> None:
    """Refuse an architecture that cannot be packed, before its weights are read; ``scores`` says that it only scores.

    With ``writes`` refuse a reward model too: it has no output layer that was trained.
    """
    config = checkpoint.raw_config()
    reason = refusal(config, scores=scores) or (only_scores(config) if writes else None)
    if reason is not None:
        raise ModelLoadError(f"{checkpoint.directory}: {reason}")


def prepare_for_packs(
    model: PreTrainedModel, attention: str, *, strict: bool, device: torch.device | None = None
) -> tuple[str, str | None]:
    """Turn dropout off and set the attention backend; return the backend and, if it is not ``attention``, why.

    The backend is one for ``device``, by default where the model lies. With ``strict``, it is an error if ``attention`` cannot
    run there.
    """
    keep_config(model)
    refuse_extra_state(model)
    turn_dropout_off(model)
    check_packable(model)
    rotate_by_sequence(model)
    backend, note = choose_backend(attention, model.dtype, device or device_of(model), strict=strict)
    model.set_attn_implementation(REGISTERED[backend])
    return backend, note


def device_of(model: PreTrainedModel) -> torch.device:
    """Where a model computes that lies on one device."""
    return input_embedding(model).weight.device


def turn_dropout_off(model: PreTrainedModel) -> None:
    """Set every dropout rate to 0: in modules, in rates that attention passes on, and in the config in memory.

    The noise of a mixture's routers goes too, and routers that draw experts at random in training stay in evaluation.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if ("dropout" in name or name in JITTER) and isinstance(value, float):
                setattr(module, name, 0.0)
        if type(module).__name__ in DRAWING_ROUTERS:
            vars(module.eval())["train"] = partial(_stay, module)  # takes the place of the method
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        for name, value in config.to_dict().items():
            if ("dropout" in name or name.endswith("pdrop")) and isinstance(value, (int, float)):
                setattr(config, name, 0.0)


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """Leave a module in the mode it has, whatever ``mode`` is asked for."""
    return module


def install_log_prob_head(model: PreTrainedModel) -> LogProbHead:
    """Replace the output layer by one that computes log-probs in chunks, with the same parameters."""
    layer = model.get_output_embeddings()
    if isinstance(layer, LogProbHead):
        return layer
    if not isinstance(layer, nn.Linear):
        raise ModelLoadError(
            f"{type(model).__name__} has no linear output layer, so its log-probabilities cannot be "
            "computed: choose another model"
        )
    config = model.config.get_text_config()
    head = LogProbHead.around(
        layer, config.final_logit_softcapping if hasattr(config, "final_logit_softcapping") else None
    )
    model.set_output_embeddings(head)
    return head


@torch.no_grad()
def check_packing(model: PreTrainedModel, backbone: PreTrainedModel) -> None:
    """Run short sequences packed and one by one, and refuse a model if the outputs differ.

    For a causal model the logits are compared, so a model that changes them after its output layer is refused too. A model
    in shards cannot run before an engine holds it, so it is not checked here.
    """
    if in_shards(model):
        return
    device, rows, training = device_of(model), input_embedding(model).num_embeddings, model.training
    # Three sequences: a prefix of 5 tokens with 2 more, the same prefix with 3 more, and one of 3 tokens.
    prefix, *others = (
        torch.arange(start, start + size, device=device) % rows for start, size in ((1, 5), (7, 2), (4, 3), (2, 3))
    )
    sequences = [torch.cat([prefix, others[0]]), torch.cat([prefix, others[1]]), others[2]]
    packed = Packed(
        torch.cat([prefix, *others]),
        torch.tensor([0, 5, 7, 10, 13], device=device),
        torch.tensor([0, 1, 2, 3, 4, 5, 6, 5, 6, 7, 0, 1, 2], device=device),
        torch.tensor([-1, 0, 0, -1], device=device),
    )
    model.eval()
    packed = share_alike(model.config, packed)
    try:
        alone = _runs(model, "alone", lambda: torch.cat([_run_alone(model, sequence) for sequence in sequences]))
        together = _runs(model, "packed", lambda: packed.per_sequence(packed_forward(backbone, packed)))
        try_narrowing(backbone, packed)
    finally:
        model.train(training)
    head = model.get_output_embeddings() if model is not backbone else None
    if isinstance(head, LogProbHead):
        together = head.capped(head(together))
    difference = float((together - alone).float().norm() / alone.float().norm())
    if not difference <= AGREES_TO[model.dtype]:
        raise ModelLoadError(
            f"{type(model).__name__} gives other outputs packed than alone (relative difference {difference:.2g}): it "
            "mixes segments, or changes its logits after the output layer. Choose another model"
        )


def _runs(model: PreTrainedModel, how: str, forward: Callable[[], Tensor]) -> Tensor:
    """Run a model for the first time; what its code raises becomes an error that names the model."""
    try:
        return forward()
    except ModelLoadError:
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ModelLoadError(
            f"{type(model).__name__} cannot be run {how} ({type(error).__name__}: {reason}). Choose another model"
        ) from error


def _run_alone(model: PreTrainedModel, sequence: Tensor) -> Tensor:
    output = model(input_ids=sequence[None], attention_mask=torch.ones_like(sequence)[None], use_cache=False)
    tensor: Tensor = (output.logits if "logits" in output else output.last_hidden_state)[0]
    return tensor
