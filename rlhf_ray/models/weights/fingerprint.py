"""The fingerprint of a model: its weights, its config and its tokenizer, and those of its base if it is an adapter.

Invariant: every file that loading the model may read counts, and no other; where the directory lies does not count. A model
of a hub is known by its commit, so that a machine that runs no rank need not fetch the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.weights.checkpoint import CODE, FROM_HUB, INDEX, WEIGHTS, find_description, named_base, read_json
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
    return _fingerprint(model.path, model.revision, code=model.trust_remote_code)


def _fingerprint(name: str, revision: str | None, *, code: bool, adapters: tuple[Path, ...] = ()) -> Fingerprint:
    """The fingerprint of the model at a path or hub id; ``adapters`` are the directories that led to it."""
    directory = find_description(name, revision)
    if directory in adapters:
        raise ModelLoadError(f"{directory} is an adapter whose base is itself: set base_model_name_or_path to a model")
    is_on_hub = not Path(name).expanduser().is_dir()
    own = Fingerprint((("commit", directory.name),)) if is_on_hub else fingerprint(_files(directory, code=code), name)
    base = named_base(directory)
    if base is None:
        return own
    below = _fingerprint(*base, code=code, adapters=(*adapters, directory))
    return Fingerprint((*own.files, *((f"base/{file}", digest) for file, digest in below.files)))


def _files(directory: Path, *, code: bool) -> Iterator[tuple[str, Path]]:
    patterns = [*FROM_HUB, "additional_chat_templates/*.jinja", *(CODE if code else [])]
    found = {str(path.relative_to(directory)) for pattern in patterns for path in directory.glob(pattern)}
    weights = _weights(directory)
    copies = {file for file in found if weights and file.startswith("consolidated")}
    yield from ((file, directory / file) for file in sorted((found | weights) - copies - NOTES))


def _weights(directory: Path) -> set[str]:
    """The files that hold the weights of a model, which an index may call anything; empty for an adapter."""
    if (directory / INDEX).is_file():
        content = read_json(directory / INDEX).get("weight_map", {})
        return {str(file) for file in content.values()} if isinstance(content, dict) else set()
    return {WEIGHTS} if (directory / WEIGHTS).is_file() else set()
