"""What of a model belongs on disk: its parameters, its persistent buffers, and the config that it was read with.

Invariants: each parameter comes exactly once (a tied one under its first name), each buffer under each of its names, in the
order of the modules, whether or not its module has parameters of its own. State of other kinds, which safetensors cannot hold,
is refused. Nothing that a run switches on or off for itself (dropout, the router's logits, the attention backend) is in the
config. Only the number of tokens and the pad token follow the model, since a grown embedding and its padding belong to the
weights.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.weights.checkpoint import read_json

EXTRA = "_extra_state"
"""What torch calls state of a module that is neither parameter nor buffer."""
KEPT = "config_as_read"
GENERATION = "generation_config.json"
FOLLOWING = ("vocab_size", "pad_token_id")
"""Keys that follow the model in memory: an embedding that grew, and the token that pads."""


def held_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Return the parameters and persistent buffers of ``module`` with their names in memory."""
    persistent, seen = module.state_dict().keys(), set[int]()
    named: list[tuple[str, Tensor]] = []
    for path, owner in module.named_modules():
        start = f"{path}." if path else ""
        own = owner.named_buffers(recurse=False, remove_duplicate=False)
        buffers = [(name, buffer) for name, buffer in own if start + name in persistent]
        parameters = [
            (name, tensor) for name, tensor in owner.named_parameters(recurse=False) if id(tensor) not in seen
        ]
        seen |= {id(tensor) for _, tensor in parameters}
        named += [(start + name, tensor) for name, tensor in (*parameters, *buffers)]
    return named


def refuse_extra_state(model: nn.Module) -> None:
    """Refuse a model with state that could not be written."""
    extra = [name for name in model.state_dict() if name.rpartition(".")[2] == EXTRA]
    if extra:
        raise ModelLoadError(
            f"{type(model).__name__} holds {extra[0]}, which is neither a parameter nor a buffer, so that it would be lost on "
            "writing: choose another model, or keep that state in a buffer"
        )


class ConfigAsRead:
    """The JSON of a config, that of its generation config if there is one, and what the following keys were then."""

    def __init__(self, model: PreTrainedModel, raw: dict[str, Any] | None, directory: Path | None) -> None:
        self.raw = json.loads(model.config.to_json_string()) if raw is None else deepcopy(raw)
        self.generation: dict[str, Any] | None = None
        if directory is None:
            if model.can_generate() and model.generation_config is not None:
                self.generation = json.loads(model.generation_config.to_json_string())
        elif (directory / GENERATION).is_file():
            self.generation = read_json(directory / GENERATION)
        self._before = _following(model.config)

    def now(self, config: PreTrainedConfig) -> dict[str, Any]:
        """Return the JSON, with the following keys as they are in ``config`` where they have changed."""
        content = deepcopy(self.raw)
        for path, value in _following(config).items():
            if self._before.get(path) != value:
                part = content if path[0] == "" else content.setdefault(path[0], {})
                part[path[1]] = value
        return content


def keep_config(model: PreTrainedModel, raw: dict[str, Any] | None = None, directory: Path | None = None) -> None:
    """Remember the config of ``model`` before anything is changed; the first call for a model counts.

    ``raw`` is config.json as it stands in ``directory``; without it the config in memory is remembered.
    """
    if not hasattr(model, KEPT):
        setattr(model, KEPT, ConfigAsRead(model, raw, directory))


def config_as_read(model: PreTrainedModel) -> ConfigAsRead:
    """Return what :func:`keep_config` remembered, or the config in memory of a model that was never prepared."""
    return cast(ConfigAsRead, getattr(model, KEPT)) if hasattr(model, KEPT) else ConfigAsRead(model, None, None)


def _following(config: Any) -> dict[tuple[str, str], Any]:
    """Return the following keys by (name of the part of the config, key); the part is empty for the config itself."""
    parts = {"": config} | {name: getattr(config, name, None) for name in config.sub_configs}
    return {
        (name, key): getattr(part, key)
        for name, part in parts.items()
        for key in FOLLOWING
        if part is not None and hasattr(part, key)
    }
