"""``python -m tests.faults.groups [--shape SHAPE] [--keep]``: SIGKILL to a rank of every role at its work.

One rank each of policy, critic, reference and reward is killed while it computes, in one PPO run on a real Ray. Always true of
a run that passes: it ends by itself, in the bits of the run that nothing disturbed; the ledger has each prompt once; the driver
is one process from start to end; only the processes of the killed role are others than before, and no process is left.

Prints how long each group took to come back, from the moment at which its loss was noticed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import load_file

from benchmarks.figures import REFERENCE, Figure, record
from rlhf_ray.actors.groups import Group
from rlhf_ray.actors.ranks import RayRanks
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.launch.driver import train_new_run
from rlhf_ray.pending import Pending
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.incidents import Incident
from rlhf_ray.trainers.recovery import Recovery

CONFIG = Path(__file__).parents[1] / "e2e" / "ppo_tiny.yaml"
SETTINGS = [
    "rollout.backend=transformers", "rollout.engines=1", "rollout.max_new_tokens=4", "monitoring.ray_metrics=false",
    "batch={prompts_per_step: 4, samples_per_prompt: 1, sequences_per_update: 4, max_tokens_per_micro_batch: 512}",
    "data.world={prompts: 64, evaluation_prompts: 2}", "evaluation={prompts: 2}", "checkpoint.every_steps=1",
    "cluster.num_cpus=2", "algorithm.kl={coefficient: 0.1}", "steps=3",
]  # fmt: skip
VICTIMS: dict[tuple[str, str], int] = {
    ("reference", "log_probs"): 4, ("reward", "score"): 9, ("critic", "accumulate"): 2, ("policy", "accumulate"): 4,
}  # fmt: skip
"""Which call of a role meets the kill, counted from 1; all come after the first commit."""


class Killer:
    """Kills rank 0 of a role when a call is on its way that is to meet its death, and knows all processes."""

    def __init__(self, victims: dict[tuple[str, str], int]) -> None:
        self.victims = dict(victims)
        self.calls: Counter[tuple[str, str]] = Counter()
        self.groups: dict[str, Group] = {}
        self.recovery: Recovery | None = None
        self.killed: list[str] = []
        self.replaced: list[dict[str, bool]] = []
        """After each recovery, by role, whether its processes are others than before."""
        self._call, self._survive = RayRanks.call, Recovery.survive

    def processes(self) -> dict[str, tuple[int, ...]]:
        """The process ids of all ranks, by role."""
        asked = {role: group.health(60.0) for role, group in self.groups.items()}
        return {role: tuple(one["pid"] for one in answer.result()) for role, answer in asked.items()}

    def is_due(self, role: str, method: str) -> bool:
        """Whether this call is to meet a death, which then is due no more."""
        due = self.victims.get((role, method)) == self.calls[role, method]
        if due:
            del self.victims[role, method]
        return due

    def call(self, ranks: RayRanks, method: str, *arguments: Any, **options: Any) -> Pending[list[Any]]:
        """``RayRanks.call``, with a death on the way where one is due."""
        self.calls[ranks.role, method] += 1
        if not self.is_due(ranks.role, method):
            return self._call(ranks, method, *arguments, **options)
        self.before = self.processes()
        pending = self._call(ranks, method, *arguments, **options)
        os.kill(self.before[ranks.role][0], signal.SIGKILL)
        self.killed.append(ranks.role)
        return pending

    def survive(self, recovery: Recovery, *arguments: Any) -> None:
        """``Recovery.survive``; notes whose processes are others then."""
        self._survive(recovery, *arguments)
        now = self.processes()
        self.replaced.append({role: now[role] != self.before[role] for role in now})

    def __enter__(self) -> Killer:
        killer, init = self, Recovery.__init__

        def remember(recovery: Recovery, groups: Any, *rest: Any) -> None:
            init(recovery, groups, *rest)
            killer.groups, killer.recovery = recovery.groups, recovery

        self._patches = [
            mock.patch.object(RayRanks, "call", lambda *a, **o: killer.call(*a, **o)),
            mock.patch.object(Recovery, "survive", lambda *a: killer.survive(*a)),
            mock.patch.object(Recovery, "__init__", remember),
        ]
        for patch in self._patches:
            patch.start()
        return self

    def __exit__(self, *error: object) -> None:
        for patch in self._patches:
            patch.stop()


def weights_of(run: RunDirectory) -> dict[str, torch.Tensor]:
    """The final weights of policy and critic."""
    places = {"policy": run.final, "critic": run.final / "critic"}
    return {
        f"{role}/{name}": tensor
        for role, path in places.items()
        for name, tensor in load_file(path / "model.safetensors").items()
    }


def survive_kills(root: Path, overrides: Sequence[str] = ()) -> list[Incident]:
    """Train twice, undisturbed and with a kill of every role; returns the incidents. Raises where a promise is broken."""
    runs = {}
    for name, victims in (("whole", {}), ("killed", VICTIMS)):
        config = load_config(CONFIG, [*SETTINGS, f"run.root={root}", f"run.name={name}", *overrides], kind="ppo")
        with Killer(victims) as killer:
            train_new_run(dump_config(config))
        runs[name] = RunDirectory.open(root / name)
    assert not killer.victims, f"not met: {killer.victims}, calls: {killer.calls}"
    for role, replaced in zip(killer.killed, killer.replaced, strict=True):
        assert replaced == {one: one == role for one in killer.groups}, (role, replaced)
    expected, found = weights_of(runs["whole"]), weights_of(runs["killed"])
    differing = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]
    assert not differing, differing
    ledgers = [[(entry.step, entry.prompt_ids) for entry in run.ledger.entries()] for run in runs.values()]
    assert ledgers[0] == ledgers[1]
    assert len(runs["killed"].attempts.read()) == 1
    incidents = runs["killed"].incidents.read()
    assert [one.role for one in incidents] == killer.killed and {one.fault for one in incidents} == {"died"}
    return incidents


def main() -> None:
    """Print the incidents and the longest recovery."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="llama-tiny", help="of the models of all roles")
    parser.add_argument("--keep", action="store_true", help="keep the longest recovery as a figure")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    options = parser.parse_args()
    shapes = [f"{role}.model.make.shape={options.shape}" for role in ("policy", "critic", "reference", "reward")]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as root:
        incidents = survive_kills(Path(root), [*shapes, *options.overrides])
    for one in incidents:
        print(
            json.dumps({"role": one.role, "phase": one.phase, "seconds": round(one.seconds, 2), "lost": one.lost_steps})
        )
    longest = max(one.seconds for one in incidents)
    print(f"back within {longest:.1f} s; all took {time.monotonic() - began:.0f} s")
    if options.keep:
        method = (
            "the longest of four times from when a killed rank was noticed until training went on: policy (2 ranks), critic, "
            f"reference and reward, {options.shape} in fp32 each; in the bits of the run that met nothing; 2 cores"
        )
        record({f"faults.back_seconds.{options.shape}": Figure(longest, "s", False, method)}, REFERENCE)


if __name__ == "__main__":
    main()
