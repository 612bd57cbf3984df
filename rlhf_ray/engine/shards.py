"""A rank's training state on disk, in DeepSpeed's own format.

Always true: loading what was saved and going on gives the same bits as never having stopped; shards of a group of another
shape are refused before DeepSpeed opens them. DeepSpeed reads its shards with pickle: whoever loads them verifies them
against a manifest first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from rlhf_ray.errors import IntegrityError, RequestError

TAG = "shards"
IDENTITY_FILE = "engine.json"


def save(engine: Any, directory: Path, identity: dict[str, int | str], updates: int) -> None:
    """Write the shards of this rank, and from rank 0 what they are."""
    directory.mkdir(parents=True, exist_ok=True)
    engine.save_checkpoint(str(directory), tag=TAG, save_latest=False)
    save_file(_random_state(), str(_random_file(directory)))
    if dist.get_rank() == 0:
        (directory / IDENTITY_FILE).write_text(json.dumps({**identity, "updates": updates}, indent=2) + "\n")
    dist.barrier()


def files_of(ranks: int) -> list[str]:
    """Files that :func:`save` leaves of an engine of so many ranks, one from each at least; DeepSpeed's own not counted."""
    return [IDENTITY_FILE, *(_random_name(rank) for rank in range(ranks))]


def load(engine: Any, directory: Path, identity: dict[str, int | str]) -> int:
    """Restore this rank's shards; returns how many updates they had seen."""
    stored = _read_identity(directory)
    updates = stored.pop("updates")
    if stored != identity:
        raise RequestError(
            f"{directory} was saved by an engine with {_words(stored)}, but this one has {_words(identity)}: "
            "resume with the settings of the run"
        )
    path, _ = engine.load_checkpoint(str(directory), tag=TAG, load_lr_scheduler_states=False)
    if path is None:
        raise IntegrityError(f"{directory}: DeepSpeed found no shards of rank {dist.get_rank()}")
    _restore_random_state(load_file(str(_random_file(directory))))
    return int(updates)


def _read_identity(directory: Path) -> dict[str, Any]:
    path = directory / IDENTITY_FILE
    if not path.is_file():
        raise IntegrityError(f"{directory} holds no engine state: {IDENTITY_FILE} is missing")
    stored: dict[str, Any] = json.loads(path.read_text())
    return stored


def _words(identity: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in identity.items())


def _random_name(rank: int) -> str:
    return f"random-{rank}.safetensors"


def _random_file(directory: Path) -> Path:
    return directory / _random_name(dist.get_rank())


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _restore_random_state(state: dict[str, torch.Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
