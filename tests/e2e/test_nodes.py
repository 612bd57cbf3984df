"""A group of ranks on two machines whose own names are loopback addresses, as on Debian. `make nodes` tries more of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf_ray.runs.directory import RunDirectory
from tests.nodes.machines import missing, placed_on, start_cluster, two_machines

SFT = (
    "demo-sft", "policy.model.make.shape=llama-tiny", "policy.ranks=2", "policy.resources.cpus_per_rank=0.6",
    "data.world.demonstrations=96", "batch.sequences_per_update=32", "epochs=1", "evaluation.every_steps=0",
    "checkpoint.every_steps=3", "cluster.address=auto",
)  # fmt: skip

pytestmark = [
    pytest.mark.early,
    pytest.mark.skipif(missing() is not None, reason=f"makes machines of namespaces, which needs {missing()}"),
]


def test_ranks_on_two_machines_train(tmp_path: Path) -> None:
    with two_machines(tmp_path) as (first, second):
        start_cluster(first, second)
        shared = tmp_path / "runs"
        output = first.rlhf_ray("train", "sft", *SFT, f"run.root={shared}")
        assert placed_on(output, "policy: 2 ranks") == {f"{first.address} (node1)", f"{second.address} (node2)"}
        run = RunDirectory.open(shared / "demo-sft")
        assert [line["step"] for line in run.metrics.read() if "loss/sft" in line] == [1, 2, 3]
        ranks = {path.name for path in (run.checkpoints.checkpoint_path(3) / "policy").iterdir()}
        assert len(ranks) >= 2, ranks
