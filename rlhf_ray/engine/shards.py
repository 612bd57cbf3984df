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
from torch import Tensor, nn

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


def load(engine: Any, directory: Path, identity: dict[str, int | str], *, quantized: bool = False) -> int:
    """Restore this rank's shards; returns how many updates they had seen. ``quantized``: some weights are in 4 bits."""
    stored = _read_identity(directory)
    updates = stored.pop("updates")
    if stored != identity:
        raise RequestError(
            f"{directory} was saved by an engine with {_words(stored)}, but this one has {_words(identity)}: "
            "resume with the settings of the run"
        )
    path, _ = engine.load_checkpoint(
        str(directory), tag=TAG, load_lr_scheduler_states=False, custom_load_fn=_load_module if quantized else None
    )
    if path is None:
        raise IntegrityError(f"{directory}: DeepSpeed found no shards of rank {dist.get_rank()}")
    _restore_random_state(load_file(str(_random_file(directory))))
    return int(updates)


def _load_module(src: dict[str, Tensor], dst: nn.Module) -> None:
    """Load a module with weights in 4 bits: torch writes their scales beside them, and does not read them again.

    The scales are frozen with the weights, so they must be what the module has of its checkpoint already.
    """
    held = dst.state_dict()
    scales = held.keys() - dict(dst.named_parameters()).keys() - dict(dst.named_buffers()).keys()
    changed = sorted(name for name in scales if name not in src or not src[name].cpu().equal(held[name].cpu()))
    if changed:
        raise IntegrityError(
            f"the model that was loaded is not the one that was quantised before: {changed[0]} differs"
        )
    dst.load_state_dict({name: tensor for name, tensor in src.items() if name not in scales})


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
