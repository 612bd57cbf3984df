"""The fingerprint of a model: its weights, its config and its tokenizer, and those of its base if it is an adapter.

Invariant: every file that loading the model may read counts, and no other; where the directory lies does not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.weights.checkpoint import CODE, FROM_HUB, INDEX, WEIGHTS, find_base, find_directory, read_json
from rlhf_ray.storage.fingerprint import Fingerprint, fingerprint, fingerprint_content
from rlhf_ray.storage.made import MANIFEST

WORDS_OF_THE_WORLD = "world"
NOTES = {MANIFEST, "trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"}
"""Files in JSON that trainers write beside a model, and that no loader reads."""


def fingerprint_model(model: ModelConfig) -> Fingerprint:
    """The fingerprint of the model that ``model`` names, as it lies on disk now.

    The files of an adapter's base have names that begin with ``base/``. A made model is known by what it is made from: the
    file that its tokenizer is trained on. Raises :class:`ModelLoadError` or :class:`StorageError` where it cannot be read.
    """
    if model.make is not None:
        origin = model.make.tokenizer_from
        return Fingerprint(()) if origin == WORDS_OF_THE_WORLD else fingerprint_content([origin])
    assert model.path is not None
    return fingerprint(_files(model.path, model.revision, code=model.trust_remote_code), model.path)


def _files(
    name: str, revision: str | None, *, code: bool, adapters: tuple[Path, ...] = ()
) -> Iterator[tuple[str, Path]]:
    """Names and paths of the files of a model; ``adapters`` are the directories that led to it."""
    directory = find_directory(name, revision, code=code)
    if directory in adapters:
        raise ModelLoadError(f"{directory} is an adapter whose base is itself: set base_model_name_or_path to a model")
    patterns = [*FROM_HUB, "additional_chat_templates/*.jinja", *(CODE if code else [])]
    found = {str(path.relative_to(directory)) for pattern in patterns for path in directory.glob(pattern)}
    weights = _weights(directory)
    copies = {file for file in found if weights and file.startswith("consolidated")}
    for file in sorted((found | weights) - copies - NOTES):
        yield file, directory / file
    base = find_base(directory)
    if base is not None:
        below = _files(*base, code=code, adapters=(*adapters, directory))
        yield from ((f"base/{file}", path) for file, path in below)


def _weights(directory: Path) -> set[str]:
    """The files that hold the weights of a model, which an index may call anything; empty for an adapter."""
    if (directory / INDEX).is_file():
        content = read_json(directory / INDEX).get("weight_map", {})
        return {str(file) for file in content.values()} if isinstance(content, dict) else set()
    return {WEIGHTS} if (directory / WEIGHTS).is_file() else set()
