"""A run whose checkpoint was saved by two ranks goes on with one, as ``rlhf-ray resume RUN policy.ranks=1`` does it.

Here one rank had saved it, and what says how many it was is changed, so the way over is taken and the bits must be the same.
With real groups of ranks: ``tests/engine/test_universal.py`` and ``tests/e2e/test_other_ranks.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rlhf_ray import storage
from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.launch.driver import continue_run, train_new_run
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.record import Record, read_record, write_record

SETTINGS = [
    "policy.model.make.shape=llama-tiny", "policy.model.dtype=fp32", "policy.ranks=1", "policy.engine.zero=2",
    "policy.engine.optimizer={learning_rate: 0.005, weight_decay: 0.1, schedule: constant, warmup_fraction: 0}",
    "data.world.demonstrations=96", "batch.sequences_per_update=32", "evaluation.every_steps=0",
    "checkpoint.every_steps=3", "monitoring.ray_metrics=false",
]  # fmt: skip


def trained(root: Path, name: str, epochs: int) -> RunDirectory:
    config = load_config(
        "demo-sft", [f"run.root={root}", f"run.name={name}", f"epochs={epochs}", *SETTINGS], kind="sft"
    )
    train_new_run(dump_config(config), place=ThisProcess(config.cluster))
    return RunDirectory.open(root / name)


def as_if_two_ranks_had_trained(run: RunDirectory) -> None:
    """Change what the run and its checkpoint say of their number."""
    checkpoint = run.checkpoints.checkpoint_path(run.checkpoints.steps()[-1])
    identity = json.loads((checkpoint / "policy" / "engine.json").read_text()) | {"ranks": 2}
    storage.amend(checkpoint, {"policy/engine.json": json.dumps(identity)})
    text = dump_config(load_config(run.config_path, ["policy.ranks=2"]))
    run.config_path.write_text(text)
    record = read_record(run.inputs_path)
    assert record is not None
    write_record(run.inputs_path, Record(text, record.inputs))


@pytest.mark.long
def test_a_run_of_two_ranks_goes_on_with_one(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    whole, run = trained(tmp_path, "whole", 2), trained(tmp_path, "run", 1)
    as_if_two_ranks_had_trained(run)
    continue_run(str(run.path), ["epochs=2", "policy.ranks=1"], place=ThisProcess(load_config(run.config_path).cluster))

    again = RunDirectory.open(run.path)
    files = [one.final / "model.safetensors" for one in (whole, again)]
    assert files[0].read_bytes() == files[1].read_bytes()
    (_, attempt) = again.attempts.read()
    assert {"key": "policy.ranks", "from": 2, "to": 1} in attempt["changes"]
    assert [path.name for path in (run.path / "checkpoints").iterdir() if not path.name.startswith("step-")] == []
