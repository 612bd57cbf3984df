"""One rank of the tests of states that another number of ranks saved.

Usage: other_ranks_program.py RANK WORLD_SIZE PORT DIRECTORY save|load|back [CASE ...]
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from curves import BACK, CASES, STARTS, UPDATES_AFTER, UPDATES_BEFORE
from other_ranks import gone_on, loaded_by_deepspeed_alone, odd_engine, saved

from rlhf_ray.engine import destroy_process_group, init_process_group, rendezvous

SHIFT = 0.5


def scenarios(directory: Path, world: int, part: str, names: list[str]) -> Iterator[tuple[str, Any]]:
    """What one part of the test measures, by name."""
    for name in names:
        options, before = (STARTS | CASES)[name], 0 if name in STARTS else UPDATES_BEFORE
        if part == "save":
            yield name, saved(directory / name, odd_engine(**options), before)
        if part == "load":
            then = directory / f"{name}-of-{world}"
            yield name, gone_on(directory / name, odd_engine(**options, shift=SHIFT), before, then)
        if part == "back" and name in BACK:
            for other in (1, 3):
                state = directory / f"{name}-of-{other}"
                engine = odd_engine(**options, shift=SHIFT)
                yield f"{name}-of-{other}", gone_on(state, engine, before + UPDATES_AFTER // 2)
    if part == "load" and world == 1 and "fp32-zero3" in names:
        engine = odd_engine(3, "fp32", SHIFT)
        yield "deepspeed-alone", loaded_by_deepspeed_alone(directory / "fp32-zero3", engine)


def main(rank: int, world: int, port: int, directory: Path, part: str, names: list[str]) -> None:
    """Run one part."""
    torch.set_num_threads(1)
    init_process_group(rank, world, rendezvous(rank, world, "127.0.0.1", port) if world > 1 else None, timeout_s=120)
    measured = dict(scenarios(directory, world, part, names or [*CASES, *STARTS]))
    destroy_process_group()
    (directory / f"{part}-{world}-{rank}.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), sys.argv[5], sys.argv[6:])
