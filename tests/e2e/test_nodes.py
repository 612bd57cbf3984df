"""A group of ranks on two machines whose own names are loopback addresses, as on Debian. `make nodes` tries more of it."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest

from rlhf_ray.monitoring.report.summary import Summary
from rlhf_ray.runs.directory import RunDirectory
from tests.nodes.machines import Machine, missing, placed_on, start_cluster, two_machines

SFT = (
    "demo-sft", "policy.model.make.shape=llama-tiny", "policy.ranks=2", "policy.resources.cpus_per_rank=0.6",
    "data.world.demonstrations=96", "batch.sequences_per_update=32", "epochs=1", "evaluation.every_steps=0",
    "checkpoint.every_steps=3", "cluster.address=auto",
)  # fmt: skip

pytestmark = [
    pytest.mark.early,
    pytest.mark.skipif(missing() is not None, reason=f"makes machines of namespaces, which needs {missing()}"),
]


class Pages:
    """Reads the pages of Ray's agents on both machines again and again while a run goes on."""

    def __init__(self, *machines: Machine) -> None:
        self.ranks: dict[str, set[str]] = {machine.name: set() for machine in machines}
        """Of the policy, those that told the page of a machine all that a rank on a CPU tells."""
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._read, args=(machine,)) for machine in machines]

    def __enter__(self) -> Pages:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(timeout=60)

    def _read(self, machine: Machine) -> None:
        while not self._over.wait(1.0):
            told = [
                set(
                    re.findall(
                        rf'^ray_rlhf_rank_{name}{{[^}}]*rank="(\d)",[^}}]*role="policy",run="demo-sft"', page, re.M
                    )
                )
                for page in [machine.page()]
                for name in ("resident_gb", "pss_gb", "busy_share")
            ]
            self.ranks[machine.name] |= set.intersection(*told)


def test_ranks_on_two_machines_train(tmp_path: Path) -> None:
    with two_machines(tmp_path) as (first, second):
        start_cluster(first, second)
        shared = tmp_path / "runs"
        with Pages(first, second) as pages:
            output = first.rlhf_ray("train", "sft", *SFT, f"run.root={shared}")
        assert placed_on(output, "policy: 2 ranks") == {f"{first.address} (node1)", f"{second.address} (node2)"}
        run = RunDirectory.open(shared / "demo-sft")
        assert [line["step"] for line in run.metrics.read() if "loss/sft" in line] == [1, 2, 3]
        ranks = {path.name for path in (run.checkpoints.checkpoint_path(3) / "policy").iterdir()}
        assert len(ranks) >= 2, ranks
        assert pages.ranks == {"node1": {"0"}, "node2": {"1"}} or pages.ranks == {"node1": {"1"}, "node2": {"0"}}
        memory = Summary.from_json((run.path / "summary.json").read_text()).memory
        assert memory is not None and memory.nodes.keys() == {"node1", "node2"}
        assert min(memory.nodes.values()) > 0.2, "a rank has torch and DeepSpeed in it"
        assert sum(memory.nodes.values()) == pytest.approx(memory.pss_gb + memory.object_store_gb, abs=0.01)
