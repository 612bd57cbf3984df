"""The config of a model as it was read, which is what a written model gets.

Invariants: nothing that a run switches on or off for itself (dropout, the router's logits, the attention backend) is in it.
Only the number of tokens and the pad token follow the model, since a grown embedding and its padding belong to the weights.
"""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedConfig, PreTrainedModel

KEPT = "config_as_read"
GENERATION = "generation_config.json"
FOLLOWING = ("vocab_size", "pad_token_id")
"""Keys that follow the model in memory: an embedding that grew, and the token that pads."""


class ConfigAsRead:
    """The JSON of a config, that of its generation config if there is one, and what the following keys were then."""

    def __init__(self, model: PreTrainedModel, raw: dict[str, Any] | None, directory: Path | None) -> None:
        self.raw = json.loads(model.config.to_json_string()) if raw is None else deepcopy(raw)
        self.generation: dict[str, Any] | None = None
        if directory is None:
            if model.can_generate() and model.generation_config is not None:
                self.generation = json.loads(model.generation_config.to_json_string())
        elif (directory / GENERATION).is_file():
            self.generation = json.loads((directory / GENERATION).read_text("utf-8"))
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
