"""Load the training state of a group into a group of another size, by way of DeepSpeed's universal checkpoint.

Invariants: training that goes on from a state is, but for rounding, the training that never stopped, whatever the number of
ranks then and now. The state that is read stays as it is: what is converted lies in a directory of its own, which is removed
again; one that a kill left behind has the name of a write that was cut off. Nothing in the files is run.

DeepSpeed 0.19 loses and breaks things on the way, which are put right here and in :mod:`rlhf_ray.engine.conversion`, each with
a test that fails without. ZeRO-3 gives every parameter group the settings of the first one, and all of them the same tensor as
their count of steps, to which each then adds. Buffers are not restored. At ZeRO 1 and 2 a rank that holds no part of a group
ends with an IndexError. Shards from before the first update have no moments, without which nothing is converted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from deepspeed.utils.tensor_fragment import fragment_address, tensor_fragment
from torch import Tensor, nn

import rlhf_ray
from rlhf_ray import errors
from rlhf_ray.engine.conversion import CONVERTED, ERROR, FORCED, SHARDS, WITHOUT_MOMENTS
from rlhf_ray.engine.weights_only import WeightsOnlyReader, weights_only
from rlhf_ray.errors import IntegrityError, RlhfRayError
from rlhf_ray.storage import PendingDirectory, begin_directory, storage_errors

LOG = "log"
"""What DeepSpeed's converter prints."""


def load(
    engine: Any,
    shards: Path,
    scratch: Path,
    load_module: Callable[[dict[str, Tensor], nn.Module], None],
    *,
    updates: int,
) -> None:
    """Restore weights, optimizer and buffers of a ZeRO 1 to 3 engine from the ``shards`` of a group of another size.

    ``scratch`` is a directory that all ranks see, in which the converted state lies meanwhile. ``load_module`` gets what the
    shards hold of the module besides what the optimizer brings. Collective; every rank raises what rank 0 meets.
    """
    pending = _from_first(lambda: _converted(shards, scratch, without_moments=updates == 0))
    try:
        groups = engine.optimizer.param_groups
        settings = [{name: value for name, value in group.items() if name != "params"} for group in groups]
        with _reading_universal(engine):
            load_module(_module_state(pending.path / CONVERTED), engine.module)
            path, _ = engine.load_checkpoint(str(pending.path), tag=CONVERTED, load_lr_scheduler_states=False)
        if path is None:
            raise IntegrityError(f"{shards}: DeepSpeed found nothing in what it has made of these shards")
        for group, own in zip(groups, settings, strict=True):
            group.update(own)
        for state in engine.optimizer.optimizer.state.values():
            state["step"] = state["step"].clone()
        dist.barrier()  # until every rank has read it
    finally:
        if dist.get_rank() == 0:
            pending.abort()


def _from_first(make: Callable[[], PendingDirectory]) -> PendingDirectory:
    """What ``make`` returns or raises on rank 0, on every rank. Collective."""
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            told = [make()]
        except Exception as error:
            told = [(type(error).__name__, str(error) or repr(error))]
    dist.broadcast_object_list(told)
    if isinstance(told[0], tuple):
        raise _error(*told[0])
    pending: PendingDirectory = told[0]
    return pending


def _error(kind: str, message: str) -> RlhfRayError:
    known = getattr(errors, kind, None)
    error: RlhfRayError = known(message) if known is not None else RlhfRayError(f"{kind}: {message}")
    return error


def _converted(shards: Path, scratch: Path, *, without_moments: bool) -> PendingDirectory:
    """A directory below ``scratch`` with what DeepSpeed makes of ``shards``, in a process of its own."""
    pending = begin_directory(scratch / f"{shards.parent.name}-{shards.name}-on-other-ranks")
    try:
        with storage_errors(pending.path):
            pending.path.chmod(0o700)  # ranks read it by pickle
            (pending.path / SHARDS).symlink_to(shards.resolve(), target_is_directory=True)
            with open(pending.path / LOG, "wb") as log:
                _convert(pending.path, log, [WITHOUT_MOMENTS] if without_moments else [])
    except BaseException:
        pending.abort()
        raise
    return pending


def _convert(work: Path, log: Any, options: list[str]) -> None:
    packages = [str(Path(rlhf_ray.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {
        "PYTHONPATH": os.pathsep.join(packages), "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    command = [sys.executable, "-P", "-m", "rlhf_ray.engine.conversion", *options]
    # The pipe is never written to: its end, when this process ends, ends the other.
    with subprocess.Popen(
        command, cwd=work, env=os.environ | variables, stdin=subprocess.PIPE, stdout=log, stderr=log
    ) as process:
        code = process.wait()
    if code == 0:
        return
    said = work / ERROR
    if said.is_file():
        told = json.loads(said.read_text())
        raise _error(told["kind"], told["message"])
    lines = (work / LOG).read_text(errors="replace").strip().splitlines()
    raise RlhfRayError(
        f"the shards of other ranks could not be converted (exit code {code}; -9 is a lack of memory): {lines[-1:]}. Resume "
        "with as many ranks as the run had"
    )


def _module_state(directory: Path) -> dict[str, Tensor]:
    """What the first rank saved of the module: at ZeRO-3 its buffers, and names without weights."""
    path = min(directory.glob("*model_states.pt"))
    state: dict[str, Tensor] = WeightsOnlyReader().load(str(path), map_location="cpu")["module"]
    return state


@contextmanager
def _reading_universal(engine: Any) -> Iterator[None]:
    """Let an engine load a universal checkpoint in the ``with`` block, whatever it was configured for."""
    forced = os.environ.get(FORCED)
    os.environ[FORCED] = "1"  # it reads some files past its checkpoint_engine
    engine.load_universal_checkpoint = lambda: True
    try:
        with weights_only(engine), _empty_parts(engine.optimizer):
            yield
    finally:
        del engine.load_universal_checkpoint
        if forced is None:
            del os.environ[FORCED]
        else:
            os.environ[FORCED] = forced


@contextmanager
def _empty_parts(optimizer: Any) -> Iterator[None]:
    """Give this rank an empty part of a weight of each group of which it has none, for the ``with`` block.

    DeepSpeed takes the step count of a group from the first weight that has a part on this rank.
    """
    given = []
    for index, group in enumerate(getattr(optimizer, "bit16_groups", [])):  # of ZeRO 1 and 2
        if all(weight._hp_mapping is None for weight in group):
            flat = optimizer.single_partition_of_fp32_groups[index]
            group[0]._hp_mapping = tensor_fragment(
                lp_fragment=group[0].detach().flatten()[:0],
                lp_fragment_address=fragment_address(numel=0, start=0),
                hp_fragment=flat.detach()[:0],
                hp_fragment_address=fragment_address(numel=0, start=0),
                gradient_dict={},
                offload_gradient_dict={},
                use_offload=False,
                param_group_index=index,
            )
            given.append(group[0])
    try:
        yield
    finally:
        for weight in given:
            weight._hp_mapping = None
