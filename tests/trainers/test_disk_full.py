"""A run whose disk fills up says so, loses nothing that was committed, leaves no half file, and goes on once there is space."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import set_num_threads

from rlhf_ray.actors.groups import PolicyGroup
from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.errors import DiskFullError
from rlhf_ray.monitoring.metrics_log import MetricsLog
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.checkpointing import Checkpointer
from rlhf_ray.trainers.ppo.build import train_ppo

TINY_PPO = Path(__file__).parents[1] / "e2e" / "ppo_tiny.yaml"
ONE_PROCESS = ["policy.ranks=1", "policy.engine.zero=0", "rollout.backend=transformers", "rollout.engines=1",
               "monitoring.ray_metrics=false", "evaluation.prompts=4", "steps=3", "checkpoint.every_steps=1"]  # fmt: skip
LEFT = 20_000
"""Bytes that the others leave on the disk; a model needs more."""


def fill(disk: Path, left: int) -> None:
    """Fill the disk, beside threads of the run that write to it too."""
    others = disk / "others"
    while not others.exists():
        usage = os.statvfs(disk)
        try:
            others.write_bytes(bytes(usage.f_bavail * usage.f_frsize - left))
        except OSError:  # something was written since the look
            others.unlink()


@pytest.mark.parametrize(
    ("owner", "call", "number", "what", "kept"),
    [
        (PolicyGroup, "save_without_weights", 1, "rollout-start", []),
        (Checkpointer, "save", 2, "", [1]),  # written in the background: another file may meet the full disk first
        (MetricsLog, "log", 1, "metrics.jsonl", None),
        (Checkpointer, "save_final", 1, "final", [2, 3]),
    ],
    ids=["rollout-start", "checkpoint", "metrics", "final"],
)
def test_a_disk_that_fills_up_costs_nothing_that_was_committed(
    owner: type[Any],
    call: str,
    number: int,
    what: str,
    kept: list[int] | None,
    small_disk: Callable[[int], Path],
    monkeypatch: pytest.MonkeyPatch,
    project_log: io.StringIO,
) -> None:
    set_num_threads(1)
    disk = small_disk(30_000)
    config = load_config(TINY_PPO, [f"run.root={disk}", *ONE_PROCESS], kind="ppo")
    run = RunDirectory.create(disk / config.run.name, dump_config(config))
    method, calls = getattr(owner, call), []

    def meet_a_full_disk(self: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(call)
        if len(calls) == number:
            fill(disk, LEFT if call in ("save", "save_final") else 0)
        return method(self, *arguments, **options)

    monkeypatch.setattr(owner, call, meet_a_full_disk)
    with pytest.raises(Exception, match=r".") as caught:
        train_ppo(config, run, None, place=ThisProcess(config.cluster))
    assert caught.type is DiskFullError
    assert str(caught.value).startswith(f"disk full: cannot write {run.path}/{what}"), caught.value
    assert "are free at " in str(caught.value)
    assert kept is None or run.checkpoints.steps() == kept
    assert not [*run.path.rglob(".pending-*")]
    run.release()
    if call != "save":  # going on is shown for a checkpoint
        return
    half = f"disk full: cannot write {run.checkpoints.checkpoint_path(2)}/policy"
    assert half in str(caught.value) or half in project_log.getvalue()
    monkeypatch.undo()
    (disk / "others").unlink()
    again, checkpoint = RunDirectory.resume(run.path)
    assert checkpoint is not None and checkpoint.step == 1
    train_ppo(config, again, checkpoint, place=ThisProcess(config.cluster))
    assert (run.final / "model.safetensors").is_file() and again.checkpoints.steps()[-1] == 3
