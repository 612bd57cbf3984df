"""Every kind of job in one process, with a ``breakpoint()`` in the workers, as someone who debugs a rank would write one; and
a debugger that only notes that it was reached.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import rlhf_ray
from rlhf_ray.cli.main import main

SMALL_SFT = {"policy.model.make.shape": "llama-tiny", "data.world.demonstrations": 64}
ONE_STEP = ("rollout.backend=transformers", "steps=1", "evaluation.prompts=4")


def note() -> None:
    """In the place of a debugger (``PYTHONBREAKPOINT``): append what the frame that stopped can see to a file.

    The debugger is imported anew, so the name of the run comes by the environment.
    """
    worker = sys._getframe(1).f_locals["worker"]
    health = worker.health()
    with Path(os.environ["BREAKPOINTS"]).open("a") as notes:
        notes.write(
            json.dumps({"run": os.environ["RUN"], "role": health["role"], "pid": health["pid"], "here": os.getpid()})
            + "\n"
        )


def stop_in_workers() -> None:
    """Put a breakpoint at the start of every worker's ``setup``."""
    from rlhf_ray.actors.workers.model import ModelWorker
    from rlhf_ray.actors.workers.rollout import RolloutWorker

    for worker_class in (ModelWorker, RolloutWorker):
        _stop_before(worker_class)


def _stop_before(worker_class: Any) -> None:
    setup = worker_class.setup

    def stopping_setup(worker: Any, *arguments: Any) -> Any:
        breakpoint()
        return setup(worker, *arguments)

    worker_class.setup = stopping_setup


def train_from_python() -> None:
    """Supervised and reward training, by the functions of the package."""
    for name, config, overrides, metric in (
        ("demo-sft", "demo-sft", SMALL_SFT, "loss/sft"),
        ("tiny-rm", "rm.yaml", {}, "loss/rm"),
    ):
        os.environ["RUN"] = name
        run = rlhf_ray.train(config, overrides, in_process=True)
        assert run.status["state"] == "finished", run.status
        assert run.config.to_train().run.name == run.directory.name == name
        assert run.metrics()[metric].notna().any()
        assert run.report(f"{name}.html").read_text().startswith("<!")


def train_on_the_command_line(config: str) -> int:
    """PPO, as a user types it."""
    os.environ["RUN"] = "tiny"
    return main(["train", "ppo", config, *ONE_STEP, "--in-process"])


if __name__ == "__main__":
    stop_in_workers()
    print(os.getpid(), flush=True)
    train_from_python()
    sys.exit(train_on_the_command_line(sys.argv[1]))
