"""A model directory on disk: its config, and which file holds which tensor.

Invariants: weights are read from safetensors only; a pickle is refused by its name and never opened. A name that is neither
a local directory nor a hub id within reach is an error that says so. The directory of a LoRA adapter leads to the base model
that it names.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    StrictDataclassError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from rlhf_ray.config.files.architectures import quantized
from rlhf_ray.config.files.config_values import wrong_values
from rlhf_ray.config.files.reward_record import KEY
from rlhf_ray.config.files.score_heads import HEAD_NAME as HEAD_NAME
from rlhf_ray.environment import expand_home, is_hub_id
from rlhf_ray.errors import ModelLoadError

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
HEAD_FILE = "value_head.safetensors"
"""The file beside weights, or beside an adapter, in which LLaMA-Factory keeps the head of a reward model."""
STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""What safetensors and torch call a dtype."""
NORMALIZATION = ("mean", "std")
"""Keys of config.json with which a reward model normalises its scores."""
IN_LAYERS = re.compile(r"\.(layers|blocks|layer|h)\.\d+\.")
"""What names of tensors within the layers of a model contain."""
NOT_BUILT = (ValueError, OSError, KeyError, TypeError, AttributeError, ArithmeticError, AssertionError)
"""What transformers and torch raise where a config.json describes no model that they can build."""
FROM_HUB, CODE = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"], ["*.py"]


@dataclass(frozen=True)
class Checkpoint:
    """A directory with a config and safetensors: which file holds which tensor."""

    directory: Path
    file_of: dict[str, str]
    adapter: Path | None = None
    """The directory of a LoRA adapter for this model, if the caller opened one; else None."""

    @classmethod
    def open(cls, name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Checkpoint:
        """Find the directory or hub id ``name`` and list its tensors."""
        directory = find_directory(name, revision, code=trust_remote_code)
        base = find_base(directory)
        if base is not None:
            own = find_directory(*base)
            if named_base(own) is not None:
                raise ModelLoadError(
                    f"{directory} is a LoRA adapter of {base[0]}, an adapter itself: merge that first, with rlhf-ray export"
                )
            return replace(cls.open(*base, trust_remote_code=trust_remote_code), adapter=directory)
        if not (directory / "config.json").is_file():
            raise ModelLoadError(
                f"{directory} has no config.json: give a model directory, with config.json and safetensors"
            )
        return cls(directory, _tensor_files(directory) | dict.fromkeys(names_in(directory, HEAD_FILE), HEAD_FILE))

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

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of one tensor, without reading it."""
        try:
            with safe_open(self.directory / self.file_of[name], framework="pt") as file:
                return tuple(file.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(f"{self.directory / self.file_of[name]} cannot be read: {error}") from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every tensor, without reading them."""
        return {name: shape for name, _, shape in self._headers()}

    def _headers(self) -> Iterator[tuple[str, str, tuple[int, ...]]]:
        """Name, stored dtype and shape of every tensor."""
        for path in sorted({self.directory / file for file in self.file_of.values()}):
            try:
                with safe_open(path, framework="pt") as file:
                    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (safe_open is not a mapping)
            except (SafetensorError, OSError) as error:
                raise ModelLoadError(f"{path} cannot be read: {error}") from error
            for name, part in slices.items():
                yield name, part.get_dtype(), tuple(part.get_shape())

    def stored_dtype(self) -> str:
        """Return torch's name of the dtype in which most of the numbers are stored, which config.json may not say."""
        numbers: Counter[str] = Counter()
        for _, dtype, shape in self._headers():
            numbers[dtype] += prod(shape)
        if not numbers:
            raise ModelLoadError(f"{self.directory} names no tensors: copy the whole model again")
        most = max(numbers, key=lambda dtype: numbers[dtype])
        return STORED.get(most, most)

    def config(self, *, trust_remote_code: bool = False) -> PreTrainedConfig:
        """Read the config."""
        raw = self.raw_config()
        reason = quantized(raw)
        if reason is not None:
            raise ModelLoadError(f"{self.directory}: {reason}")
        try:
            config: PreTrainedConfig = AutoConfig.from_pretrained(self.directory, trust_remote_code=trust_remote_code)
        except (*NOT_BUILT, StrictDataclassError) as error:
            if "auto_map" in raw and not trust_remote_code:
                raise ModelLoadError(
                    f"{self.directory} brings Python code of its own (auto_map in config.json), which is not run: read "
                    "it, and set trust_remote_code if you trust it"
                ) from error
            raise ModelLoadError(f"{self.directory / 'config.json'} cannot be read: {error}") from error
        for name, value in self._trained_with_adapter().items():
            setattr(config, name, value)
        if self.adapter is not None and KEY not in self._trained_with_adapter():
            vars(config).pop(KEY, None)  # it is of the base alone
        return config

    def raw_config(self) -> dict[str, Any]:
        """Read config.json as it stands, without the defaults of transformers."""
        raw = read_json(self.directory / "config.json")
        for sentence in wrong_values(raw):
            raise ModelLoadError(f"{self.directory}: {sentence}")
        if self.adapter is not None:
            raw.pop(KEY, None)  # the record of the base says nothing of the adapter
        return raw | self._trained_with_adapter()

    def _trained_with_adapter(self) -> dict[str, Any]:
        """Return the mean and std that lie beside the adapter, and the record of its training, as far as they are there."""
        if self.adapter is None or not (self.adapter / "config.json").is_file():
            return {}
        beside = read_json(self.adapter / "config.json")
        return {name: beside[name] for name in (*NORMALIZATION, KEY) if name in beside}


def find_base(directory: Path) -> tuple[str, str | None] | None:
    """Return the name and revision of the base of the adapter in ``directory``, or None if it holds no adapter.

    A directory that also holds weights of its own is a model, not an adapter.
    """
    base = named_base(directory)
    if base is None:
        return None
    try:
        find_directory(*base)
    except ModelLoadError as error:
        raise ModelLoadError(f"{directory} is a LoRA adapter of {base[0]}: {error}") from error
    return base


def named_base(directory: Path) -> tuple[str, str | None] | None:
    """The same as :func:`find_base`, wherever the base lies and whether or not it is there."""
    path = directory / "adapter_config.json"
    if not path.is_file() or any((directory / name).is_file() for name in (WEIGHTS, INDEX)):
        return None
    config = read_json(path)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ModelLoadError(f"{path} does not say which model it belongs to: set base_model_name_or_path to its name")
    revision = config.get("revision")
    return base, revision if isinstance(revision, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or raise :class:`ModelLoadError`."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ModelLoadError(f"{path} cannot be read: it holds no JSON object")
    return content


def find_directory(name: str, revision: str | None = None, *, code: bool = False) -> Path:
    """Return the local directory of a path or hub id, fetched if need be; Python files are fetched only with ``code``."""
    return _local_directory(name) or _fetch(name, revision, FROM_HUB + CODE * code)


def find_description(name: str, revision: str | None = None) -> Path:
    """The same as :func:`find_directory` without weights: a directory with the JSON files of a model.

    That of a hub id is named after the commit that the hub has, or the cache if the hub is not asked.
    """
    return _local_directory(name) or _fetch(name, revision, ["*.json"])


def _local_directory(name: str) -> Path | None:
    """The directory at the path ``name``; None for a hub id."""
    path = expand_home(name)
    if path.is_dir():
        return path
    if path.is_file():
        raise ModelLoadError(f"model path {name!r} is a file: give the directory with config.json and safetensors")
    if not is_hub_id(name):
        raise ModelLoadError(f"model path {name!r} does not exist: give a directory, or a hub id such as org/name")
    return None


def _fetch(name: str, revision: str | None, patterns: list[str]) -> Path:
    """The directory into which files of a hub id were fetched."""
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled, HFValidationError, OSError) as error:
        raise ModelLoadError(
            f"model {name!r} is not a local directory and could not be fetched from the hub ({type(error).__name__}): "
            "check the name, the network and HF_HUB_OFFLINE, or download it and give its directory"
        ) from error


def _tensor_files(directory: Path) -> dict[str, str]:
    if (directory / INDEX).is_file():
        weight_map = _read_index(directory / INDEX)
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
    return dict.fromkeys(names_in(directory, WEIGHTS), WEIGHTS)


def _read_index(path: Path) -> dict[str, str]:
    """Which file holds which tensor, by an index; each file is safetensors and lies in the directory of the index.

    Transformers opens whatever an index names, a pickle too.
    """
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelLoadError(f"{path} does not map names of tensors to files (weight_map): write the model anew")
    for name, file in weight_map.items():
        place = PurePath(file)
        if place.is_absolute() or ".." in place.parts:
            raise ModelLoadError(
                f"{path} says that {name} is in {file!r}, which is not in its directory: copy the file there, and correct the "
                "index"
            )
        if place.suffix != ".safetensors":
            raise ModelLoadError(
                f"{path} says that {name} is in {file!r}, which is not safetensors; a pickle can run code when opened and is "
                "never read: convert it to safetensors, and correct the index"
            )
    return weight_map


def names_in(directory: Path, file: str) -> list[str]:
    """The names of the tensors in a file; none if there is no such file."""
    if not (directory / file).is_file():
        return []
    try:
        with safe_open(directory / file, framework="pt") as opened:
            return list(opened.keys())
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(f"{directory / file} cannot be read: {error}") from error
