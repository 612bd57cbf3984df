"""Save and load one rank's training state, in DeepSpeed's own format.

Invariants: training that goes on from a saved state gives the same bits as training that never stopped. The state of a group
of another shape is refused before DeepSpeed opens it. DeepSpeed reads its files with pickle, so the caller must verify them
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
    """Write the state of this rank; rank 0 also writes which group it belongs to. Collective."""
    directory.mkdir(parents=True, exist_ok=True)
    engine.save_checkpoint(str(directory), tag=TAG, save_latest=False)
    save_file(_random_state(), str(_random_file(directory)))
    if dist.get_rank() == 0:
        (directory / IDENTITY_FILE).write_text(json.dumps({**identity, "updates": updates}, indent=2) + "\n")
    dist.barrier()


def expected_files(ranks: int) -> list[str]:
    """Return the files that :func:`save` writes for this many ranks, at least one per rank, besides DeepSpeed's own."""
    return [IDENTITY_FILE, *(_random_name(rank) for rank in range(ranks))]


def load(engine: Any, directory: Path, identity: dict[str, int | str], *, quantized: bool = False) -> int:
    """Restore the state of this rank; return the number of updates before it. Collective.

    ``quantized`` says that some weights are in 4 bits.
    """
    stored = _read_identity(directory)
    updates = stored.pop("updates")
    if stored != identity:
        raise RequestError(
            f"{directory} was saved by an engine with {_in_words(stored)}, but this one has {_in_words(identity)}: "
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
    """Load a module with weights in 4 bits. torch writes their scales into the state, but cannot read them.

    The scales are frozen with the weights, so they must equal those that the module already has from its checkpoint.
    """
    current = dst.state_dict()
    scales = current.keys() - dict(dst.named_parameters()).keys() - dict(dst.named_buffers()).keys()
    changed = sorted(name for name in scales if name not in src or not src[name].cpu().equal(current[name].cpu()))
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


def _in_words(identity: dict[str, Any]) -> str:
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
