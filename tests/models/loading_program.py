"""One of two ranks that load models into workers under ZeRO-3, and how much memory that takes at its peak.

Usage: loading_program.py RANK PORT DIRECTORY
"""

from __future__ import annotations

import gc
import json
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.actors.workers.policy import LanguageSetup, ReferenceWorker
from rlhf_ray.actors.workers.reward import RewardSetup, RewardWorker
from rlhf_ray.config.sections.roles import RoleConfig
from rlhf_ray.engine import destroy_process_group

WORLD, SECONDS_BETWEEN = 2, 0.002
COLLECTIVE_TIMEOUT_S = 321.0


def anonymous() -> int:
    """Bytes of this process that no file backs."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("RssAnon")))


class Peak(threading.Thread):
    """Watches the memory of this process until it is stopped."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.before = self.most = anonymous()
        self.done = threading.Event()

    def run(self) -> None:
        while not self.done.is_set():
            self.most = max(self.most, anonymous())
            time.sleep(SECONDS_BETWEEN)

    def stop(self) -> int:
        self.done.set()
        self.join()
        return self.most - self.before


def setup(path: Path, port: int, kind: type[LanguageSetup | RewardSetup]) -> Any:
    model = {"path": str(path), "dtype": "bf16", "head_init": "zero"}
    role = RoleConfig.model_validate({"model": model, "engine": {"zero": 3}, "ranks": WORLD})
    return kind(role, seed=0, rendezvous=("127.0.0.1", port), collective_timeout_s=COLLECTIVE_TIMEOUT_S)


def timeouts(worker: ReferenceWorker | RewardWorker) -> list[float]:
    """Seconds that a collective of the ranks' own group may take, one of DeepSpeed's, and a look into the store."""
    world = torch.distributed.group.WORLD
    groups = (world, worker.engine._deepspeed.data_parallel_group)
    options = [group._get_backend(torch.device("cpu")).options for group in groups]
    return [one.total_seconds() for one in (*(o._timeout for o in options), world.get_group_store().timeout)]


def close(worker: ReferenceWorker | RewardWorker) -> int:
    """Leave the group; the port at which the ranks meet again, where nobody else listens."""
    worker.engine.close()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] if worker.rank == 0 else 0]
    torch.distributed.broadcast_object_list(ports, src=0)
    destroy_process_group()
    return ports[0]


def main(rank: int, port: int, directory: Path) -> None:
    torch.set_num_threads(1)
    peaks: dict[str, Any] = {}
    for family, kind, needs in (("llama", ReferenceWorker, LanguageSetup), ("mixtral", RewardWorker, RewardSetup)):
        tiny, worker = kind(rank, WORLD), kind(rank, WORLD)
        tiny.hold_rendezvous("127.0.0.1", port)
        tiny.setup(setup(directory / f"{family} tiny", port, needs))  # imports what loading needs
        port = close(tiny)
        del tiny
        gc.collect()
        peak = Peak()
        peak.start()
        worker.hold_rendezvous("127.0.0.1", port)
        worker.setup(setup(directory / family, port, needs))
        peaks[family] = peak.stop()
        peaks["timeouts"] = timeouts(worker)
        port = close(worker)
    (directory / f"rank{rank}.json").write_text(json.dumps(peaks))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
