"""What a run knows of itself: the config that it had last, and the fingerprints of what it is made from.

Invariant: the record is written whole when a run begins and whenever it goes on, after the changes that it holds stand in
``attempts.jsonl``; so what differs from it was changed since.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_ray import storage
from rlhf_ray.errors import IntegrityError
from rlhf_ray.storage.fingerprint import Fingerprint
from rlhf_ray.storage.reading import read_bytes

FORMAT = 1
Inputs = Mapping[str, Fingerprint]
"""Fingerprints by the key of the config that names the input."""


@dataclass(frozen=True)
class Record:
    """The config, as YAML with every default, and the inputs of the last attempt."""

    config: str
    inputs: Inputs = field(default_factory=dict)


def write_record(path: Path, record: Record) -> None:
    """Keep the record in the file ``path`` of a run directory."""
    inputs = {key: one.to_json() for key, one in record.inputs.items()}
    content = {"format": FORMAT, "inputs": inputs, "config": record.config}
    storage.write_file(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def read_record(path: Path) -> Record | None:
    """What :func:`write_record` kept; none in the directory of a run that began before there were records."""
    if not path.exists():
        return None
    raw = read_bytes(path)
    try:
        content = json.loads(raw)
        inputs = {str(key): Fingerprint.from_json(one, path) for key, one in content["inputs"].items()}
        return Record(str(content["config"]), inputs)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"{path} is damaged ({type(error).__name__}): restore it from a backup, or remove it to go on without knowing "
            "whether config, data and models are those that the run had"
        ) from error
