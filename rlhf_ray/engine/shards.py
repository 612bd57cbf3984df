"""Save and load one rank's training state, in DeepSpeed's own format.

Invariants: training that goes on from a saved state gives the same bits as training that never stopped, on as many ranks; on
another number it is the same but for rounding (:mod:`rlhf_ray.engine.universal`). Frozen weights are not in it, but their
digests are: a model whose frozen weights are others is refused, by the name of one. The state of an engine at another ZeRO
stage or in another precision is refused too, both before DeepSpeed opens it. Nothing in the files is run
(:mod:`rlhf_ray.engine.weights_only`); that they are what was written, the caller verifies against a manifest first.

A state that was saved with its frozen weights, as before this rule, brings them back as it did.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_ray.config.files.places import pattern_marks
from rlhf_ray.engine import universal
from rlhf_ray.engine.distributed import all_agree
from rlhf_ray.engine.frozen import Digests, changed_weights, frozen_names
from rlhf_ray.engine.weights_only import weights_only
from rlhf_ray.errors import IntegrityError, ModelLoadError, RequestError
from rlhf_ray.storage.manifest import FileRecord, hash_files

TAG = "shards"
IDENTITY_FILE = "engine.json"
KEYS = {"zero": "engine.zero", "dtype": "model.dtype"}
"""The keys of the config, below a role, that an engine's identity follows from."""
FROZEN_FILE = "frozen.json"
"""The digests of the frozen weights, in a state of a model that has some."""


@dataclass(frozen=True)
class Unwritten:
    """The state of this rank, of which nothing is on disk yet but directories."""

    directory: Path
    files: Mapping[Path, Callable[[], None]]
    """How each file is written."""
    there: Sequence[Path]
    """Files that DeepSpeed has put beside them."""

    def write(self) -> dict[str, FileRecord]:
        """Write the files; returns the size and hash of every file of this rank, by its path below ``directory``.

        Not collective. It changes nothing that training reads, and so may run in a thread beside it.
        """
        for write in self.files.values():
            write()
        names = [path.relative_to(self.directory).as_posix() for path in (*self.files, *self.there)]
        return hash_files(self.directory, names, threads=1)  # a rank has few files, and its cores train


def save(
    engine: Any,
    directory: Path,
    identity: dict[str, int | str],
    updates: int,
    frozen: Digests,
    take: Callable[[Any], Any] = lambda state: state,
) -> Unwritten:
    """The state of this rank as it is now, to be written into ``directory``; at least one file a rank.

    ``take`` is given every object that DeepSpeed would write, and returns what is written in its place: a copy, or the object
    itself where nothing trains before all is written. Rank 0 also writes which group the state belongs to, and the digests of
    ``frozen`` weights. Collective. The engine's module must leave its frozen weights out of its state.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with _deferred(engine, take) as files:
        engine.save_checkpoint(str(directory), tag=TAG, save_latest=False, exclude_frozen_parameters=True)
    files[_random_file(directory)] = partial(save_file, _random_state(engine.device), str(_random_file(directory)))
    there: list[Path] = []
    if dist.get_rank() == 0:
        # DeepSpeed puts scripts beside the shards, which read them without it.
        there = [path for path in directory.iterdir() if path.is_file()]
        described = {IDENTITY_FILE: {**identity, "updates": updates}} | ({FROZEN_FILE: frozen} if frozen else {})
        for name, content in described.items():
            text = json.dumps(content, indent=2) + "\n"
            files[directory / name] = partial(_write_text, directory / name, text)
    dist.barrier()  # no rank writes into the directory before rank 0 has looked what is there
    return Unwritten(directory, files, there)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text)


class _Deferring:
    """DeepSpeed's own ``checkpoint_engine``, which is an interface of DeepSpeed's, but that it does not write yet."""

    def __init__(self, own: Any, take: Callable[[Any], Any]) -> None:
        self._own, self._take, self.files = own, take, dict[Path, Callable[[], None]]()

    def save(self, state_dict: Any, path: str) -> None:
        self.files[Path(path)] = partial(self._own.save, self._take(state_dict), path)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)


@contextmanager
def _deferred(engine: Any, take: Callable[[Any], Any]) -> Iterator[dict[Path, Callable[[], None]]]:
    """Collect how the files are written that a DeepSpeed engine would write on this rank in the ``with`` block."""
    own = engine.checkpoint_engine
    engine.checkpoint_engine = deferring = _Deferring(own, take)
    try:
        yield deferring.files
    finally:
        engine.checkpoint_engine = own


def load(
    engine: Any, directory: Path, identity: dict[str, int | str], frozen: Digests, base: str, scratch: Path
) -> int:
    """Restore the state of this rank; return the number of updates before it. Collective.

    ``frozen`` are the digests of the frozen weights that the engine has now, which came from ``base``. Raises
    :class:`ModelLoadError` if they are not those of the state. A group of another size than the one that saved the state needs
    ``scratch`` meanwhile, a directory that all ranks see.
    """
    _refuse_a_pattern(directory)
    stored = _read_identity(directory)
    updates, ranks = int(stored.pop("updates")), int(stored["ranks"])
    _refuse_another_engine(directory, stored, identity)
    before = directory / FROZEN_FILE
    if before.is_file():
        _refuse_other_weights(json.loads(before.read_text()), frozen, base, engine.device)
    load_module = partial(_load_module, with_frozen=not before.is_file())
    if ranks == dist.get_world_size() or identity["zero"] == 0:
        with weights_only(engine):
            path, _ = engine.load_checkpoint(
                str(directory), tag=TAG, load_lr_scheduler_states=False, custom_load_fn=load_module
            )
        if path is None:
            raise IntegrityError(f"{directory}: DeepSpeed found no shards of rank {dist.get_rank()}")
    else:
        if frozen and not before.is_file() and identity["zero"] == 3:
            raise RequestError(
                f"{directory} holds parts of frozen weights, as an earlier version wrote them, which only {ranks} ranks can "
                f"join: resume with ranks={ranks}, and with another number from the next checkpoint on"
            )
        load_rest = partial(load_module, without_trained=True)
        universal.load(engine, directory / TAG, scratch, load_rest, updates=updates)
    _continue_random_state(directory, ranks, updates, engine.device)
    return updates


def _refuse_a_pattern(directory: Path) -> None:
    """Raise where DeepSpeed would read another folder, such as one that was moved since its run began."""
    if marks := pattern_marks(directory):
        raise RequestError(
            f"{directory} cannot be resumed where it lies: in the names of folders DeepSpeed takes {marks} for a pattern, and "
            "would read what lies in another one. Rename the folder, and resume with its new name"
        )


def _refuse_another_engine(directory: Path, stored: dict[str, Any], identity: dict[str, int | str]) -> None:
    """Raise if a state is that of an engine with other settings, but for the number of ranks."""
    differ = [name for name in identity if name != "ranks" and stored.get(name) != identity[name]]
    if not differ:
        return
    keys = " and ".join(f"{KEYS[name]} {stored.get(name)}" for name in differ)
    raise RequestError(
        f"{directory} was saved by an engine with {_in_words(stored)}, but this one has {_in_words(identity)}: "
        f"resume with the settings of the run ({keys})"
    )


def _refuse_other_weights(before: Digests, now: Digests, base: str, device: torch.device) -> None:
    """Raise on every rank if one of them has other frozen weights than the state. Collective."""
    changed = changed_weights(before, now)
    agreed = all_agree(not changed, device)
    if agreed:
        return
    which = f"{changed[0]} differs, {len(changed)} of {len(before)} in all" if changed else "another rank found others"
    raise ModelLoadError(
        f"{base} is not the base that this run trained on: of its frozen weights {which}. Put back the files of that base, "
        "or start a new run on this one"
    )


def _load_module(src: dict[str, Tensor], dst: nn.Module, *, with_frozen: bool, without_trained: bool = False) -> None:
    """Load what a state holds of a module: all but its frozen weights, or ``with_frozen`` those too.

    ``without_trained`` leaves out the weights that are trained, which then come with the optimizer.

    torch writes the scales of weights in 4 bits into a state, but cannot read them. They are frozen with the weights, so they
    must equal those that the module already has from its checkpoint.
    """
    current = nn.Module.state_dict(dst)
    scales = current.keys() - dict(dst.named_parameters(remove_duplicate=False)).keys()
    scales -= dict(dst.named_buffers(remove_duplicate=False)).keys()
    expected = current.keys() - (set() if with_frozen else frozen_names(dst))
    odd = sorted(expected ^ src.keys())
    if odd:
        raise IntegrityError(f"the saved state does not fit the model: {odd[0]} is in one of both only")
    changed = sorted(name for name in scales & src.keys() if not src[name].cpu().equal(current[name].cpu()))
    if changed:
        raise IntegrityError(
            f"the model that was loaded is not the one that was quantised before: {changed[0]} differs"
        )
    left_out = set(scales)
    if without_trained:
        left_out |= {name for name, p in dst.named_parameters(remove_duplicate=False) if p.requires_grad}
    dst.load_state_dict({name: tensor for name, tensor in src.items() if name not in left_out}, strict=False)


def _read_identity(directory: Path) -> dict[str, Any]:
    path = directory / IDENTITY_FILE
    if not path.is_file():
        raise IntegrityError(f"{directory} holds no engine state: {IDENTITY_FILE} is missing")
    stored: dict[str, Any] = json.loads(path.read_text())
    return stored


def _in_words(identity: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in identity.items())


def _random_name(rank: int | str) -> str:
    return f"random-{rank}.safetensors"


def _random_file(directory: Path) -> Path:
    return directory / _random_name(dist.get_rank())


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _continue_random_state(directory: Path, ranks: int, updates: int, device: torch.device) -> None:
    """Go on with the random state that this rank saved; a rank beyond the ``ranks`` of then begins one of its own.

    That follows from the state of rank 0, this rank's number and ``updates``, so it is the same whenever the state is loaded.
    """
    if dist.get_rank() < ranks:
        _restore_random_state(load_file(str(_random_file(directory))), device)
        return
    first = load_file(str(directory / _random_name(0)))["cpu"].numpy().tobytes()
    digest = hashlib.sha256(first + f"{dist.get_rank()} {updates}".encode()).digest()
    torch.manual_seed(int.from_bytes(digest[:8], "big"))


def _restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
