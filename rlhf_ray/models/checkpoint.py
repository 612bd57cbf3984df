"""A model directory as it lies on disk, before any of it becomes a model.

Always true: weights are read from safetensors only; a pickle is refused by its name and never opened; a name that is
neither a directory here nor a hub id that can be reached is an error that says so.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from rlhf_ray.environment import is_hub_id
from rlhf_ray.errors import ModelLoadError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
FROM_HUB = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


@dataclass(frozen=True)
class Checkpoint:
    """A directory with a config and safetensors: which file holds which tensor."""

    directory: Path
    file_of: dict[str, str]

    @classmethod
    def open(cls, name: str, revision: str | None = None) -> Checkpoint:
        """Find the directory or hub id ``name`` and list its tensors."""
        directory = find_directory(name, revision)
        if not (directory / "config.json").is_file():
            hint = " It holds a LoRA adapter: merge it into its base first." if _is_adapter(directory) else ""
            raise ModelLoadError(f"{directory} has no config.json, so it is not a model directory.{hint}")
        return cls(directory, _tensor_files(directory))

    @property
    def names(self) -> Collection[str]:
        """Names of all tensors."""
        return self.file_of.keys()

    def read(self, name: str) -> Tensor:
        """Read one tensor."""
        try:
            with safe_open(self.directory / self.file_of[name], framework="pt") as file:
                tensor: Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{self.directory / self.file_of[name]} cannot be read: {error}") from error
        return tensor

    def config(self, *, trust_remote_code: bool = False) -> PreTrainedConfig:
        """Read the config."""
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(self.directory, trust_remote_code=trust_remote_code)
        except (ValueError, OSError, KeyError) as error:
            raise ModelLoadError(f"{self.directory / 'config.json'} cannot be read: {error}") from error
        return config

    def raw_config(self) -> dict[str, Any]:
        """Read what the config says itself, without transformers' defaults."""
        raw: dict[str, Any] = json.loads((self.directory / "config.json").read_text("utf-8"))
        return raw


def find_directory(name: str, revision: str | None = None) -> Path:
    """Return the local directory of a path or a hub id."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelLoadError(f"model path {name!r} is a file: give the directory with config.json and safetensors")
    if not is_hub_id(name):
        raise ModelLoadError(f"model path {name!r} does not exist: give a directory, or a hub id such as org/name")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=FROM_HUB))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, HFValidationError, OSError) as error:
        raise ModelLoadError(
            f"model {name!r} is no directory here and could not be fetched from the hub ({type(error).__name__}): "
            "check the name, the network and HF_HUB_OFFLINE, or download it and give its directory"
        ) from error


def _tensor_files(directory: Path) -> dict[str, str]:
    if (directory / INDEX).is_file():
        weight_map: dict[str, str] = json.loads((directory / INDEX).read_text("utf-8"))["weight_map"]
        missing = sorted({file for file in weight_map.values() if not (directory / file).is_file()})
        if missing:
            raise ModelLoadError(
                f"{directory} lacks {', '.join(missing)}, which {INDEX} names: copy the whole directory"
            )
        return weight_map
    if not (directory / WEIGHTS).is_file():
        pickles = sorted(path.name for pattern in PICKLES for path in directory.glob(pattern))
        if pickles:
            raise ModelLoadError(
                f"{directory} holds its weights as pickle ({', '.join(pickles)}), which can run code when "
                "opened and is never read: convert it to safetensors"
            )
        raise ModelLoadError(f"{directory} has no weights: expected {WEIGHTS} or {INDEX}")
    try:
        with safe_open(directory / WEIGHTS, framework="pt") as file:
            return dict.fromkeys(file.keys(), WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{directory / WEIGHTS} cannot be read: {error}") from error


def _is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()
