"""Send rows to Weights & Biases, or into files for ``wandb sync``.

Invariants: a curve is one run of wandb, by its id. Each process that feeds it offline leaves a folder of its own, and no step
is in two of them; ``wandb sync`` makes one run of them. Offline nothing is sent. wandb is told nothing of this process and
machine but the rows and the config.
"""

from __future__ import annotations

import os
from typing import Any

from rlhf_ray.config.trackers import OFFLINE
from rlhf_ray.errors import RequestError
from rlhf_ray.trackers.base import Curve
from rlhf_ray.trackers.rows import Row
from rlhf_ray.trackers.wandb_files import last_step

FOLDER = "wandb"
START_S = 60.0
"""How long the server may take to answer at the start."""


class WandbTracker:
    """Files in ``wandb/`` of the run directory, and the project of the name of ``monitoring.project`` on the server."""

    def __init__(self, place: str) -> None:
        mode = os.environ.get("WANDB_MODE", "")
        if mode in ("disabled", "dryrun") and not place:
            raise RequestError(f"WANDB_MODE={mode} keeps nothing: remove it, or write wandb:{OFFLINE}")
        self._offline = OFFLINE in (place, mode)
        if self._offline:
            os.environ["WANDB_MODE"] = OFFLINE  # said to init alone, wandb still sends figures about itself
        self._run: Any = None

    def open(self, curve: Curve) -> int:
        import wandb

        os.environ["WANDB_DIR"] = str(curve.directory)
        last = last_step(curve.directory / FOLDER, curve.unique) if self._offline else None
        self._run = wandb.init(
            project=curve.project,
            id=curve.unique,
            name=curve.name,
            group=curve.group or os.environ.get("WANDB_RUN_GROUP"),
            dir=str(curve.directory),
            config=dict(curve.config),
            resume="allow",
            settings=quiet(wandb),
        )
        return int(self._run.starting_step) - 1 if last is None else last

    def log(self, row: Row) -> None:
        self._run.log(dict(row.values), step=row.step, commit=True)

    def flush(self) -> None:
        """Nothing: wandb's own process has the rows, and lives on if this one is killed."""

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


def quiet(package: Any) -> Any:
    """Settings with which wandb looks at nothing but what it is given."""
    return package.Settings(
        console="off",
        disable_git=True,
        disable_code=True,
        save_code=False,
        init_timeout=START_S,
        x_disable_meta=True,
        x_disable_machine_info=True,
        x_disable_stats=True,
    )
