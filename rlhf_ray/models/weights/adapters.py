"""Read directories that hold a LoRA adapter for another model, in the layout of PEFT.

Invariants: every tensor of the adapter's file is used, or the directory is refused. Names, patterns and layers of its config
mean what they mean to PEFT, since they are matched against the names of the whole model. What an adapter uses beyond plain
LoRA is read as PEFT reads it, or is refused by the name of the option. A pickle is never opened.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_ray.config.files.adapters import MERGE, why_refused
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.weights.checkpoint import HEAD_NAME, read_json
from rlhf_ray.models.weights.lora import ADAPTER, EVERY_LINEAR, LINEAR, adapted_layers, inject, peft, whole_names
from rlhf_ray.models.weights.sharded import made_whole

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What PEFT writes before the name of every tensor."""
HEADS = (HEAD_NAME, "value_head")
"""What the head of a reward model or critic is called beside an adapter."""
OUTPUTS = ("lm_head.", "embed_out.", "output.")
"""How names of the output layer begin, which a backbone does not have."""
REPLACED = "replaced_by_adapter"
"""The attribute of a model that holds the names of what its adapter brought beside LoRA."""


def load_adapter(model: PreTrainedModel, directory: Path, *, head: nn.Module | None = None) -> None:
    """Put the LoRA of the adapter in ``directory`` on ``model``; what it trained whole is left to ``adapter_modules``.

    LoRA on the embedding, the output layer or ``head`` (None: there is none, or it is fresh) is merged at once, since these
    have no adapter here. A head that was trained whole is left to ``models.heads``.
    """
    config, file = lora_config(directory), read_adapter(directory)
    tensors = {name: file[name] for name in file if ".lora_" in name and belongs_to(model, name, head)}
    if not tensors:
        return
    targets = sorted({name.partition(".lora_")[0] for name in tensors})
    _check_targets(model, head, directory, config, targets)
    config.modules_to_save, config.trainable_token_indices, config.ensure_weight_tying = None, None, False
    config.init_lora_weights, config.inference_mode = True, False
    apart = (model.get_input_embeddings(), model.get_output_embeddings(), *(() if head is None else head.modules()))
    unadapted = [name for name in targets if any(whole_names(model, head).get_submodule(name) is one for one in apart)]
    view = inject(model, config, head=head, tensors=tensors)
    parameters = {name: parameter for name, parameter in view.named_parameters() if ".lora_" in name}
    _copy(parameters, {_live_name(name): tensor for name, tensor in tensors.items()}, directory)
    for name in unadapted:
        _merge_for_good(view, name)
    remember_replaced(model, [f"{name}.weight" for name in unadapted if not _in_head(name)])
    if head is not None:
        head.requires_grad_(True)


def _copy(parameters: dict[str, nn.Parameter], tensors: dict[str, Tensor], directory: Path) -> None:
    different = sorted(parameters.keys() ^ tensors.keys())
    if different:
        raise ModelLoadError(
            f"the adapter {directory} is incomplete: only one of its file and its layers has {different[0]}. Copy the whole "
            "adapter again"
        )
    for name, parameter in parameters.items():
        if parameter.shape != tensors[name].shape:
            raise ModelLoadError(
                f"{name} of the adapter {directory} has shape {tuple(tensors[name].shape)}, but with its r and rank_pattern "
                f"its model needs {tuple(parameter.shape)}: it belongs to a model of another size"
            )
        parameter.data.copy_(tensors[name])


def _check_targets(
    model: PreTrainedModel, head: nn.Module | None, directory: Path, config: Any, targets: Collection[str]
) -> None:
    """Refuse layers that the model lacks, that are tied to another, or on which ``target_modules`` and the file disagree."""
    kinds, kind = (*LINEAR, nn.Embedding), type(model).__name__
    layers = {name: layer for name, layer in whole_names(model, head).named_modules() if isinstance(layer, kinds)}
    lacking = sorted(set(targets) - layers.keys())
    if lacking:
        raise ModelLoadError(
            f"the adapter {directory} does not belong to a {kind}: it has LoRA on {lacking[0]} (target_modules), which is no "
            f"linear layer there; the experts of a mixture are 3-D parameters. Give the base that it was trained on, or {MERGE}"
        )
    tied = [name for name in targets if is_tied(model) and isinstance(layers[name], nn.Embedding)]
    tied += [name for name in targets if is_tied(model) and layers[name] is model.get_output_embeddings()]
    if tied:
        raise ModelLoadError(
            f"target_modules of the adapter {directory} holds {tied[0]}, which shares its weight with another layer of {kind} "
            f"(tie_word_embeddings): {MERGE}"
        )
    if config.target_modules == EVERY_LINEAR:
        return
    matches = peft().tuners.tuners_utils.check_target_module_exists
    different = sorted({name for name in layers if matches(config, name)} ^ set(targets))
    if different:
        one, other = ("its file", "target_modules") if different[0] in targets else ("target_modules", "its file")
        raise ModelLoadError(
            f"the adapter {directory} does not fit together: {one} has LoRA on {different[0]} (and {len(different) - 1} others "
            f"differ), but {other} has not. Copy the whole adapter again"
        )


def _merge_for_good(view: nn.Module, name: str) -> None:
    """Add a layer's LoRA to its weight, and put the layer back in its place."""
    layer: Any = view.get_submodule(name)
    plain = layer.get_base_layer()
    with made_whole([plain.weight]):
        layer.merge()
    parent, _, last = name.rpartition(".")
    setattr(view.get_submodule(parent), last, plain)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the output layer shares the weight of the input embedding."""
    output: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return output is not None and output.weight is embedding.weight


def tied_names(model: PreTrainedModel) -> tuple[str, str] | None:
    """Return the whole names of the one weight of embedding and output layer, or None if each has its own."""
    if not is_tied(model):
        return None
    names = {id(module): name for name, module in whole_names(model).named_modules()}
    embedding, output = (names[id(layer)] for layer in (model.get_input_embeddings(), model.get_output_embeddings()))
    return f"{embedding}.weight", f"{output}.weight"


def belongs_to(model: PreTrainedModel, name: str, head: nn.Module | None) -> bool:
    """Whether a tensor of an adapter is for ``model`` or ``head``: a policy has no head, and a backbone no output layer."""
    if _in_head(name):
        return head is not None
    return model.base_model is not model or not name.startswith(OUTPUTS)


def remember_replaced(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Remember the whole names of weights that an adapter brought beside LoRA. They are frozen, and saved with the adapter."""
    known: set[str] = getattr(model, REPLACED, set())
    setattr(model, REPLACED, known | set(names))


def replaced_by_adapter(model: PreTrainedModel) -> set[str]:
    """Return the whole names of weights that the model's adapter brought beside LoRA."""
    return set(getattr(model, REPLACED, ()))


def refuse_second_adapter(name: str, adapter: Path | None, rank: int) -> None:
    """Refuse to put a fresh adapter of this rank (0: none) on a model that has loaded one."""
    if adapter is not None and rank:
        raise ModelLoadError(
            f"{name} is a LoRA adapter already: leave lora_rank out (in a config, lora) to go on training it, or merge it "
            "first with rlhf-ray export"
        )


def read_adapter(directory: Path) -> dict[str, Tensor]:
    """Read the tensors of an adapter, without the prefix of PEFT."""
    pickle = directory / "adapter_model.bin"
    if not (directory / WEIGHTS).is_file():
        if pickle.is_file():
            raise ModelLoadError(
                f"{directory} holds its adapter as pickle ({pickle.name}), which can run code when opened and is never "
                "read: convert it to safetensors"
            )
        raise ModelLoadError(f"{directory} has no {WEIGHTS}: copy the whole adapter")
    try:
        return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(directory / WEIGHTS).items()}
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{directory / WEIGHTS} cannot be read: {error}") from error


def lora_config(directory: Path) -> Any:
    """Read the config of a LoRA adapter, or refuse what it uses by the name of the option."""
    refused = why_refused(read_json(directory / "adapter_config.json"))
    if refused is not None:
        raise ModelLoadError(f"the adapter {directory} {refused}")
    try:
        return peft().PeftConfig.from_pretrained(str(directory))
    except Exception as error:  # of whatever kind: PEFT makes its objects of what stands in the file
        raise ModelLoadError(
            f"the adapter {directory} has an adapter_config.json that PEFT cannot read: {error}"
        ) from error


def adapts_head(directory: Path) -> bool:
    """Whether the adapter has LoRA on a head, which it then does not hold whole."""
    return any(_in_head(name) and ".lora_" in name for name in read_adapter(directory))


def _in_head(name: str) -> bool:
    """Whether a tensor or layer is part of a head."""
    return name.partition(".")[0] in (*HEADS, "v_head")


def _live_name(name: str) -> str:
    """Return the name of a parameter in memory, which has the adapter's name before its last part, or after it."""
    path, _, last = name.rpartition(".")
    return f"{path}.{last}.{ADAPTER}" if last.startswith("lora_") else f"{path}.{ADAPTER}.{last}"


def adapter_config(model: PreTrainedModel) -> dict[str, Any]:
    """Return what PEFT would write beside the tensors of the adapter on ``model``, as far as it changes what they compute."""
    config: Any = model.peft_config[ADAPTER]
    return {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(adapted_layers(model)),
        "use_rslora": config.use_rslora,
        "rank_pattern": dict(config.rank_pattern),
        "alpha_pattern": dict(config.alpha_pattern),
        "bias": "none",
    }


def adapter_name(live: str) -> str:
    """Return the name in PEFT's file of an adapter's parameter that is called ``live`` in memory."""
    return PREFIX + live.replace(f".{ADAPTER}.", ".")
