"""One reward model that is the average of several: WARM, Rame et al. 2024 (https://arxiv.org/abs/2401.12187).

Invariants: each number of the average is the mean of that number in all models, summed in double precision and rounded to fp32
once, so that the average of equal models is that model. Models that differ in anything but their numbers are refused. The
directory holds a whole average or is not there, and says of which models, by their content.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.rewards import RewardConfig, RewardSourceConfig
from rlhf_ray.console import get_logger
from rlhf_ray.data.tokenizers import fingerprint, template_fingerprint
from rlhf_ray.errors import IntegrityError, ModelLoadError
from rlhf_ray.models import load_tokenizer
from rlhf_ray.models.weights.checkpoint import INDEX, NORMALIZATION, WEIGHTS, Checkpoint
from rlhf_ray.models.weights.fingerprint import NOTES, fingerprint_model
from rlhf_ray.processes import progress
from rlhf_ray.storage.atomic import begin_directory, remove_directory, sweep
from rlhf_ray.storage.failures import storage_errors
from rlhf_ray.storage.reading import read_text

Source = TypeVar("Source", bound=RewardSourceConfig)
MEMBERS = "averaged_from.json"
"""The file that says of which models an average is."""
MAY_DIFFER = {"_name_or_path", "transformers_version", "dtype", "torch_dtype", *NORMALIZATION}
"""Keys of ``config.json`` that say nothing of what the numbers of a model mean."""
BESIDE_WEIGHTS = {".json", ".txt", ".model", ".jinja", ".py"}
SHARD_BYTES = 4 * 2**30
"""Of one file of the average, at most, unless one tensor is larger; twice as much is held in memory."""


def with_averages(reward: RewardConfig, directory: Path) -> RewardConfig:
    """``reward`` with one model in the place of every ensemble that is reduced by its weights.

    The averages lie in ``directory``, by the keys of their sections; one that is there is written again only if its models
    are others now. Raises :class:`ModelLoadError` where models cannot be averaged.
    """
    terms = {
        name: _with_average(term, f"reward.mixture.{name}", directory) if term.averages_weights else term
        for name, term in reward.mixture.items()
    }
    reward = reward.model_copy(update={"mixture": terms}) if terms else reward
    return _with_average(reward, "reward", directory) if reward.averages_weights else reward


def _with_average(source: Source, key: str, directory: Path) -> Source:
    models = source.models
    _make(key, models, directory / key)
    one = models[0].model_copy(update={"path": str(directory / key), "revision": None})
    return source.model_copy(update={"model": one, "ensemble": [], "reduction": "mean_minus_std"})


def _make(key: str, models: Sequence[ModelConfig], target: Path) -> None:
    """Write the average to ``target``, unless it is there."""
    members = [{"path": model.path, **fingerprint_model(model).to_json()} for model in models]
    if target.is_dir() and [one["sha256"] for one in _read_members(target)] == [one["sha256"] for one in members]:
        return
    get_logger("rewards").info("%s: the weights of %d models are averaged into %s", key, len(models), target)
    with storage_errors(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    sweep(target.parent)
    if target.is_dir():  # of models that were others
        remove_directory(target)
    pending = begin_directory(target)
    try:
        average_models(models, pending.path)
        with storage_errors(pending.path):
            (pending.path / MEMBERS).write_text(json.dumps({"models": members}, indent=2))
        pending.commit()
    except BaseException:
        pending.abort()
        raise


def average_models(models: Sequence[ModelConfig], directory: Path) -> None:
    """Write the average of ``models`` as a Hugging Face directory, with the config and tokenizer of the first.

    Raises :class:`ModelLoadError` where they differ in more than numbers.
    """
    opened = [_open(model) for model in models]
    for model, checkpoint in zip(models[1:], opened[1:], strict=True):
        _require_same(models[0], opened[0], model, checkpoint)
    first = opened[0]
    with storage_errors(directory):
        for path in sorted(first.directory.iterdir()):
            if path.is_file() and path.suffix in BESIDE_WEIGHTS and path.name not in {INDEX, MEMBERS, *NOTES}:
                shutil.copy(path, directory / path.name)
        raw = first.raw_config()
        config = {name: value for name, value in raw.items() if name not in {"torch_dtype", *NORMALIZATION}}
        (directory / "config.json").write_text(json.dumps({**config, "dtype": "float32"}, indent=2))
    shards = _shards(first.shapes())
    file_of: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors[name] = _average(name, opened)
            progress.made()
        with storage_errors(directory / file):
            save_file(tensors, directory / file, metadata={"format": "pt"})
        file_of |= dict.fromkeys(names, file)
    if len(shards) > 1:
        with storage_errors(directory):
            (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": file_of}))


def _open(model: ModelConfig) -> Checkpoint:
    assert model.path is not None, "models of an ensemble have paths"
    checkpoint = Checkpoint.open(model.path, model.revision, trust_remote_code=model.trust_remote_code)
    if checkpoint.adapter is not None:
        raise ModelLoadError(
            f"{model.path} is a LoRA adapter, and products of averaged factors are no average: merge it, with rlhf-ray export"
        )
    checkpoint.config(trust_remote_code=model.trust_remote_code)  # refuses what is quantised
    return checkpoint


def _require_same(model: ModelConfig, one: Checkpoint, other_model: ModelConfig, other: Checkpoint) -> None:
    """Refuse two models whose numbers do not mean the same, with the first thing in which they differ."""
    pair = f"{model.path} and {other_model.path} cannot be averaged"
    way_out = (
        "average models of one architecture and vocabulary that began as the same one, or set reward.reduction to mean"
    )
    configs = [_comparable(each.raw_config()) for each in (one, other)]
    for name in sorted({*configs[0], *configs[1]}):
        values = [config.get(name) for config in configs]
        if values[0] != values[1]:
            shown = " and ".join(f"{value!r:.80}" for value in values)
            raise ModelLoadError(f"{pair}: {name} in config.json is {shown}; {way_out}")
    shapes = [each.shapes() for each in (one, other)]
    for name in sorted({*shapes[0], *shapes[1]}):
        sizes = [shape.get(name) for shape in shapes]
        if sizes[0] != sizes[1]:
            shown = " and ".join("missing" if size is None else str(list(size)) for size in sizes)
            raise ModelLoadError(f"{pair}: the tensor {name} is {shown}; {way_out}")
    tokenizers = [load_tokenizer(each) for each in (model, other_model)]
    for what, take in (("vocabularies", fingerprint), ("chat templates", template_fingerprint)):
        if take(tokenizers[0]) != take(tokenizers[1]):
            raise ModelLoadError(f"{pair}: their {what} differ; {way_out}")


def _comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name not in MAY_DIFFER}


def _shards(shapes: Mapping[str, tuple[int, ...]]) -> list[list[str]]:
    """The names of the tensors of each file."""
    shards: list[list[str]] = [[]]
    held = 0
    for name in sorted(shapes):
        size = 4 * prod(shapes[name])
        if shards[-1] and held + size > SHARD_BYTES:
            shards.append([])
            held = 0
        shards[-1].append(name)
        held += size
    return shards


def _average(name: str, checkpoints: Sequence[Checkpoint]) -> Tensor:
    """The mean of one tensor, in fp32; whole numbers, such as positions, are the same in all."""
    first = checkpoints[0].read(name)
    if not first.is_floating_point():
        for other in checkpoints[1:]:
            if not torch.equal(first, other.read(name)):
                raise ModelLoadError(
                    f"{checkpoints[0].directory} and {other.directory} cannot be averaged: {name} holds whole numbers that "
                    "differ: set reward.reduction to mean"
                )
        return first
    total = first.double()
    for other in checkpoints[1:]:
        total += other.read(name).double()
    return (total / len(checkpoints)).float().contiguous()


def _read_members(target: Path) -> list[dict[str, Any]]:
    """The models that the average at ``target`` is of."""
    problem = f"{target / MEMBERS} does not say of which models the average is: remove {target}, and it is made again"
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        models = json.loads(read_text(target / MEMBERS))["models"]
        if all(isinstance(one["sha256"], str) for one in models):
            return list(models)
    raise IntegrityError(problem)
