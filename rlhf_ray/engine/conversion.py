"""Turn the shards of all ranks into one file a weight, which a group of any size can read: DeepSpeed's universal checkpoint.

Invariants: nothing in the files is run, though DeepSpeed's converter reads with ``weights_only=False``: this is a process of
its own, in whose environment torch is told to read tensors, plain values and the classes of ``PLAIN`` alone
(:mod:`rlhf_ray.engine.weights_only`). Nothing is written but in the directory where the process starts. It ends with its input,
so it does not outlive the rank that started it.

Run as ``python -m rlhf_ray.engine.conversion`` by :mod:`rlhf_ray.engine.universal`, in a directory that holds the shards under
the name :data:`SHARDS`. With the argument ``--without-moments`` the shards are those of a model before its first update.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from argparse import Namespace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from rlhf_ray.engine.weights_only import WeightsOnlyReader, refusal
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.storage.failures import storage_errors

SHARDS, FILLED, CONVERTED = "shards", "filled", "converted"
"""Names in the directory of the process: what it reads, that with moments where there were none, and what it writes."""
ERROR = "error.json"
"""The class and the message of the error that ended the process, if it was one of ours."""
WITHOUT_MOMENTS = "--without-moments"
FORCED = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""With 1, torch reads with ``weights_only=True`` whatever its caller says."""


def convert(source: str, target: str) -> None:
    """Convert with DeepSpeed's own program. Paths are relative: it makes patterns of them, in which signs have a meaning."""
    from deepspeed.checkpoint import ds_to_universal

    try:
        ds_to_universal.main(
            Namespace(
                input_folder=source,
                output_folder=target,
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,  # what ZeRO 1 and 2 leave out, and ZeRO-3 does not need
            )
        )
    except UnpicklingError as error:
        raise refusal(error, os.path.realpath(source)) from error


def fill_moments(source: Path, target: Path) -> None:
    """Write the shards of a model before its first update with the moments that AdamW starts with, which DeepSpeed expects.

    Files without an optimizer are linked.
    """
    target.mkdir()
    for path in source.iterdir():
        if path.name.endswith("_optim_states.pt"):
            content = WeightsOnlyReader().load(str(path), map_location="cpu")
            _fill(content["optimizer_state_dict"])
            torch.save(content, target / path.name)
        else:
            (target / path.name).symlink_to(path.resolve())


def _fill(state: dict[str, Any]) -> None:
    in_shards = "fp32_flat_groups" in state  # ZeRO-3
    groups = state["fp32_flat_groups" if in_shards else "single_partition_of_fp32_groups"]
    moments = state["optimizer_state_dict" if in_shards else "base_optimizer_state"]["state"]
    # At ZeRO 1 and 2 moments are written with what the last rank holds beyond the weights, and weights without.
    paddings = [0] * len(groups) if in_shards else state["group_paddings"]
    for index, (group, padding) in enumerate(zip(groups, paddings, strict=True)):
        zeros = torch.zeros(group.numel() + padding, dtype=group.dtype)
        fresh = {"step": torch.zeros(()), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
        moments.setdefault(index, fresh)


def _end_with_input() -> None:
    os.read(sys.stdin.fileno(), 1)  # not through a buffer, whose lock the end of the interpreter would wait for
    os._exit(1)


def main(arguments: list[str]) -> int:
    """Convert; an error of ours is left in :data:`ERROR`. Returns the exit code."""
    threading.Thread(target=_end_with_input, daemon=True).start()
    os.environ[FORCED] = "1"
    torch.set_num_threads(1)
    try:
        with storage_errors(Path.cwd()):
            source = SHARDS
            if WITHOUT_MOMENTS in arguments:
                source = FILLED
                fill_moments(Path(SHARDS), Path(FILLED))
            convert(source, CONVERTED)
    except RlhfRayError as error:
        Path(ERROR).write_text(json.dumps({"kind": type(error).__name__, "message": str(error)}))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
