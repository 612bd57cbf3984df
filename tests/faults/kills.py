"""``python -m tests.faults.kills [--generating N] [--updating N]``: SIGKILL to rollout engines at their work, in one PPO run.

The run goes on until N engines were killed while they generated and N in the middle of a weight update, at moments drawn over
the time that either takes. A kill that came too late to disturb its call is not counted. Always true of a run that passes:
every batch holds each sample that was asked for once, in order, all by the published weights, and trainer and engine agree on
their log-probs in every step; the ledger has each prompt once; the trainers' processes are those of the start; every killed
process has one successor, and at the end all engines are healthy.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.errors import GroupError
from rlhf_ray.launch.driver import train_new_run
from rlhf_ray.rollout.fleet import Fleet
from rlhf_ray.rollout.health import ALIVE
from rlhf_ray.rollout.requests import GenerationRequest
from rlhf_ray.rollout.wire import PublishedWeights
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.ppo import build
from rlhf_ray.trainers.ppo.loop import PpoTrainer
from rlhf_ray.trajectories.batch import TrajectoryBatch

CONFIG = Path(__file__).parents[1] / "e2e" / "ppo_tiny.yaml"
WHOLE_AGAIN_S = 180.0
LATEST_SHARE = 0.8
"""Of the time of a call: the latest moment of a kill in it."""
AGREES = 1e-3
"""Largest difference of a token's log-prob between trainer and engine, in nats; other weights give far more."""


class Killer:
    """Kills one engine in each call of the fleet until enough have died, and checks what the fleet returns."""

    def __init__(
        self,
        trainer: PpoTrainer,
        pids: Callable[[int], int],
        wanted: Counter[str],
        seed: int,
        blow: signal.Signals = signal.SIGKILL,
    ) -> None:
        self.trainer, self.wanted, self.pids, self.blow = trainer, wanted, pids, blow
        self.fleet: Fleet = trainer.sampler.fleet
        self.done: Counter[str] = Counter()
        self.late = 0
        """Kills that disturbed no call."""
        self.lasted: dict[str, float] = {}
        """The shortest call of each kind that was not disturbed, in seconds."""
        self._rng = random.Random(seed)
        self._generate, self._update = self.fleet.generate, self.fleet.update_weights
        self.trained = self.processes()
        mock.patch.object(self.fleet, "generate", self.generate).start()
        mock.patch.object(self.fleet, "update_weights", self.update_weights).start()

    def processes(self) -> dict[str, list[int]]:
        """The process ids of all ranks that learn."""
        return {
            role: [rank["pid"] for rank in group.health().result()]
            for role, group in self.trainer.groups.trained.items()
        }

    def generate(self, requests: Sequence[GenerationRequest], deadline_s: float) -> TrajectoryBatch:
        batch: TrajectoryBatch = self._under_fire("generating", lambda: self._generate(requests, deadline_s))
        keys = list(zip(batch["prompt_id"].tolist(), batch["sample_index"].tolist(), strict=True))
        assert keys == [request.key for request in requests], "a sample is missing, doubled or out of order"
        assert set(batch["weight_version"][batch["action_mask"]].tolist()) == {self.fleet.health.version}
        return batch

    def update_weights(self, version: int, weights: PublishedWeights) -> None:
        self._under_fire("updating", lambda: self._update(version, weights))

    def _under_fire(self, kind: str, call: Callable[[], Any]) -> Any:
        health = self.fleet.health
        self.fleet.heal()
        healthy = self._candidates()
        if self.done[kind] >= self.wanted[kind] or kind not in self.lasted or not healthy:
            return self._timed(kind, call)
        victim = self._rng.choice(healthy)
        incarnation = health[victim].incarnation
        try:
            pid = self.pids(victim)
        except GroupError:  # it was killed too late the last time, which the fleet finds out now
            return call()
        kill = threading.Timer(self._rng.uniform(0.0, LATEST_SHARE * self.lasted[kind]), os.kill, [pid, self.blow])
        kill.start()
        value = call()
        kill.join()
        hit = health.has_died(victim, incarnation)
        self.done[kind] += hit
        self.late += not hit
        print(f"step {self.trainer.progress.step}: engine {victim} killed {kind}{'' if hit else ', too late to count'}")
        return value

    def _candidates(self) -> tuple[int, ...]:
        """Engines that may be killed now."""
        return self.fleet.health.healthy

    def _timed(self, kind: str, call: Callable[[], Any]) -> Any:
        """Only a call of which no engine is missing says how long one takes, so those that are restarted are waited for."""
        if self.done[kind] < self.wanted[kind]:
            self._wait_until(lambda: len(self.fleet.health.in_state(*ALIVE)) == len(self.fleet.health))
        began = time.monotonic()
        value = call()
        self.lasted[kind] = min(time.monotonic() - began, self.lasted.get(kind, float("inf")))
        return value

    def expect_whole(self) -> None:
        """Wait until every engine is healthy; fails if one is not in time."""
        self._wait_until(lambda: len(self.fleet.health.healthy) == len(self.fleet.health))

    def _wait_until(self, reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + WHOLE_AGAIN_S
        while not reached():
            assert time.monotonic() < deadline, self.fleet.health.describe()
            self.fleet.heal()
            time.sleep(0.1)

    def expect_all_well(self) -> None:
        """What must hold when the last step is done."""
        self.expect_whole()
        assert self.done == self.wanted, (
            f"only {dict(self.done)} of {dict(self.wanted)} kills in {self.trainer.config.steps} steps"
        )
        health = self.fleet.health
        restarts = sum(health[engine].incarnation for engine in range(len(health)))
        assert restarts == sum(self.done.values()) + self.late, (
            f"{restarts} restarts for {self.done} and {self.late} late kills"
        )
        assert self.fleet.set_aside == set()
        assert self.processes() == self.trained, "a trainer has another process than at the start"


def campaign(
    root: Path,
    generating: int,
    updating: int,
    *overrides: str,
    seed: int = 0,
    blow: signal.Signals = signal.SIGKILL,
) -> Counter[str]:
    """Run until all kills were made; returns how many of each kind. Raises AssertionError where something was lost."""
    steps = 2 * max(generating, updating) + 4
    settings = [f"run.root={root}", "run.name=kills", "monitoring.ray_metrics=false", f"steps={steps}", "cluster.num_cpus=2",
                "rollout.max_restarts=1000", "data.world={prompts: 16, evaluation_prompts: 4}", "evaluation={prompts: 4}",
                "batch={prompts_per_step: 8, samples_per_prompt: 2, sequences_per_update: 16, max_tokens_per_micro_batch: 512}",
                "checkpoint.every_steps=null"]  # fmt: skip
    config = load_config(str(CONFIG), [*settings, *overrides], kind="ppo")
    wanted = Counter(generating=generating, updating=updating)
    killers: list[Killer] = []
    original, finish = build.build, PpoTrainer.finish

    def watched(*arguments: Any) -> PpoTrainer:
        trainer = original(*arguments)
        engines = trainer.publisher._engines
        killers.append(
            Killer(trainer, lambda one: int(engines[one].call("health", [()]).result()[0]["pid"]), wanted, seed, blow)
        )
        return trainer

    def checked(trainer: PpoTrainer) -> None:
        killers[0].expect_all_well()
        finish(trainer)  # it holds the ledger against the prompts

    with mock.patch.object(build, "build", watched), mock.patch.object(PpoTrainer, "finish", checked):
        train_new_run(dump_config(config))
    run = RunDirectory.open(root / "kills")
    lines = [json.loads(line) for line in Path(run.metrics.path).read_text().splitlines()]
    apart = [line["rollout/log_prob_difference"] for line in lines if "rollout/log_prob_difference" in line]
    assert len(apart) == steps and max(apart) < AGREES, f"log-probs of trainer and engine are {max(apart)} apart"
    print(f"{sum(wanted.values())} kills counted, {killers[0].late} too late; log-probs at most {max(apart):.1e} apart")
    return killers[0].done


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign with vLLM engines, or those of ``--backend``."""
    parser = argparse.ArgumentParser(prog="tests.faults.kills", description="kill rollout engines at their work")
    parser.add_argument("--generating", type=int, default=20, help="kills while an engine generates (default 20)")
    parser.add_argument("--updating", type=int, default=20, help="kills in the middle of a weight update (default 20)")
    parser.add_argument("--backend", choices=["vllm", "transformers"], default="vllm")
    parser.add_argument("--seed", type=int, default=0, help="draws victims and moments")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-kills-") as root:
        backend = f"rollout.backend={options.backend}"
        done = campaign(Path(root), options.generating, options.updating, backend, seed=options.seed)
    print(f"{dict(done)}: nothing was lost, in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
