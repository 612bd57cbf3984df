"""This process as a place whose ranks fail when a test wants them to, and small runs on it that use every role.

A rank dies as a process does: it is gone, with all that it holds, until it is started again. Or it fails with an exception, and
lives on. Either comes before the call that it meets has an effect, or after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf_ray.actors.place import RankSpec
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.config.sections.run import ClusterConfig
from rlhf_ray.errors import DeadRankError, GroupError
from rlhf_ray.launch.driver import train_new_run
from rlhf_ray.pending import Pending
from rlhf_ray.runs.directory import RunDirectory
from tests.trainers.small_runs import TINY_PPO, config_of, signals_as_before

Fault = Literal["dies before", "dies after", "raises before", "raises after"]
EVERY_ROLE = [
    "policy.ranks=1", "policy.engine.zero=0", "rollout.backend=transformers", "rollout.engines=1",
    "rollout.max_new_tokens=4", "monitoring.ray_metrics=false", "run.name=late", "steps=3",
    "data.world={prompts: 8, evaluation_prompts: 2}", "evaluation={prompts: 2, every_steps: 2}",
    "batch={prompts_per_step: 2, samples_per_prompt: 2, sequences_per_update: 2, max_tokens_per_micro_batch: 512}",
    "algorithm.kl={coefficient: 0.1, target: 0.05, horizon: 20}", "checkpoint.every_steps=1",
    "run.max_group_restarts=1000",
]  # fmt: skip


@dataclass
class Script:
    """When ranks fail: ``when`` is asked before every call, with the role, the method and the number of calls before."""

    when: Callable[[str, str, int], Fault | None] = lambda role, method, number: None
    fails_to_load: bool = False
    """Whether loading a model counts as a call."""
    calls: list[tuple[str, str]] = field(default_factory=list)
    failed: list[tuple[str, str, Fault]] = field(default_factory=list)
    failed_at: int = 0
    """For ``when`` to remember the number of a call."""


class FailingRanks(InProcessRanks):
    """Ranks that follow a script once their model is loaded."""

    script: Script
    workers: list[Any]
    """All workers that there ever were, also those that are lost."""

    def call(
        self,
        method: str,
        arguments: Sequence[tuple[Any, ...]],
        *,
        phase: str | None = None,
        timeout_s: float | None = None,
        key: str | None = None,
    ) -> Pending[list[Any]]:
        fault = None
        loads = method == "setup"
        if method != "health" and (self.script.fails_to_load if loads else self.role != "rollout"):
            number = len(self.script.calls)
            self.script.calls.append((self.role, method))
            fault = self.script.when(self.role, method, number)
        if fault is not None:
            self.script.failed.append((self.role, method, fault))
        if fault in (None, "dies after", "raises after"):
            value = super().call(method, arguments, phase=phase, timeout_s=timeout_s, key=key)
        if fault is None:
            return value
        if fault.startswith("dies"):
            self.worker = None
        kind = DeadRankError if fault.startswith("dies") else GroupError
        error = kind(self.role, 0, method, f"the test says that it {fault}")

        def fail() -> list[Any]:
            raise error

        return Pending(fail)

    def restart(self) -> None:
        super().restart()
        self.workers.append(self.worker)


class FailingPlace(ThisProcess):
    """Starts failing ranks; a group's workers are in ``workers``, by its role."""

    def __init__(self, config: ClusterConfig, script: Script) -> None:
        super().__init__(config)
        self.script = script
        self.workers: dict[str, list[Any]] = {}

    def start(self, spec: RankSpec) -> InProcessRanks:
        plain = super().start(spec)
        ranks = FailingRanks(plain.role, plain.worker, plain._make)
        ranks.script = self.script
        ranks.workers = self.workers.setdefault(ranks.role, [ranks.worker])
        return ranks


def train_kind_with(kind: str, root: Path, script: Script, *overrides: str) -> tuple[RunDirectory, FailingPlace]:
    """Train a run of another kind, of ``small_runs``, to the end while ranks fail as ``script`` says."""
    return train_with(config_of(kind, root, "run.max_group_restarts=1000", *overrides), script)


def config_of_every_role(root: Path, *overrides: str) -> Any:
    """A deterministic PPO run of three steps of two updates each, with policy, critic, reference and reward."""
    return load_config(TINY_PPO, [f"run.root={root}", *EVERY_ROLE, *overrides], kind="ppo")


def train_with(config: Any, script: Script) -> tuple[RunDirectory, FailingPlace]:
    """Train to the end while ranks fail as ``script`` says."""
    place = FailingPlace(config.cluster, script)
    with signals_as_before():
        train_new_run(dump_config(config), place=place)
    return RunDirectory.open(Path(config.run.root) / config.run.name), place
