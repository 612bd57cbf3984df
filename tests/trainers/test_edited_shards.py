"""A checkpoint that somebody has changed, its manifest made anew, is refused before anything in it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rlhf_ray import storage
from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.errors import IntegrityError
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.storage.manifest import MANIFEST, Manifest
from rlhf_ray.trainers.ppo.build import train_ppo

TINY_PPO = Path(__file__).parents[1] / "e2e" / "ppo_tiny.yaml"
ONE_PROCESS = ["policy.ranks=1", "rollout.backend=transformers", "rollout.engines=1", "monitoring.ray_metrics=false",
               "evaluation.prompts=4", "steps=1", "checkpoint.every_steps=1"]  # fmt: skip


class Canary:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def edit(file: Path, canary: Path) -> None:
    """Add a canary to a file of a checkpoint, and make the manifest anew."""
    torch.save({**torch.load(file, weights_only=False), "extra": Canary(canary)}, file)
    canary.unlink(missing_ok=True)
    (step,) = [parent for parent in file.parents if parent.name.startswith("step-")]
    about = json.loads((step / MANIFEST).read_text())["about"]
    (step / MANIFEST).unlink()
    again = storage.begin_directory(step.with_name("again"))
    again.path.rmdir()
    step.rename(again.path)
    storage.commit(again, about)
    again.target.rename(step)
    assert isinstance(storage.verify(step), Manifest)


def test_code_in_a_shard_is_not_run(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    config = load_config(TINY_PPO, [f"run.root={tmp_path}", *ONE_PROCESS, "policy.engine.zero=1"], kind="ppo")
    run = RunDirectory.create(tmp_path / config.run.name, dump_config(config))
    train_ppo(config, run, None, place=ThisProcess(config.cluster))
    run.release()
    shard = sorted((run.checkpoints.checkpoint_path(run.checkpoints.steps()[-1]) / "policy").rglob("*.pt"))[-1]
    assert "optim" in shard.name, "the kind of file that holds classes of DeepSpeed too"
    edit(shard, tmp_path / "canary")
    again, checkpoint = RunDirectory.resume(run.path)
    try:
        train_ppo(config, again, checkpoint, place=ThisProcess(config.cluster))
        message = "it was loaded"
    except IntegrityError as error:
        message = str(error)
    assert not (tmp_path / "canary").exists(), "what stands in a shard was run"
    assert message.startswith(f"{shard} would run code when it is read (getattr), which no checkpoint"), message
