"""``python -m tests.faults.window_kills [--kills N]``: SIGKILL to rollout engines that never pause, in one PPO run.

In mode ``windowed`` with ``rollout.partial`` one engine is killed while it samples and one in the middle of a weight update,
step after step, until N of each died. Always true of a run that passes: each step has every sample of its prompts once; no
token is older than the window; the log-prob of every token is that of the weights whose version it carries, computed again from
what was published; the ledger has each prompt once; the trainers' processes are those of the start; at the end all engines are
healthy.
"""

from __future__ import annotations

import argparse
import os
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

import ray
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.errors import GroupError
from rlhf_ray.launch.driver import train_new_run
from rlhf_ray.rollout.wire import IncomingUpdate, PublishedWeights
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.ppo import build
from rlhf_ray.trainers.ppo.loop import PpoTrainer
from rlhf_ray.trainers.ppo.sampling import Collected
from rlhf_ray.trajectories.batch import TrajectoryBatch
from tests.faults.kills import AGREES, CONFIG, Killer

CHECKED = 6
"""Answers of a step whose log-probs are computed again."""
LATEST_S = 0.6
"""The latest moment of a kill after a step was taken."""


class Oracle:
    """The log-probs of tokens by the weights of each publication."""

    def __init__(self, directory: Path, shapes: dict[str, tuple[int, ...]]) -> None:
        self.config = AutoConfig.from_pretrained(directory)
        self.shapes = shapes
        with torch.device("meta"):
            self.model_class: Any = type(AutoModelForCausalLM.from_config(self.config))
        self.models: dict[int, Any] = {}

    def keep(self, weights: PublishedWeights) -> None:
        incoming = IncomingUpdate(self.shapes)
        state: dict[str, Tensor] = {}
        for handle in weights.buckets:
            state |= {name: tensor.clone() for name, tensor in incoming.accept(ray.get(handle))}
        model: Any = self.model_class.from_pretrained(None, config=self.config, state_dict=state, dtype=torch.float32)
        self.models[weights.version] = model.eval()

    @torch.no_grad()
    def apart(self, batch: TrajectoryBatch) -> float:
        """The largest difference of a token's log-prob, in nats, from that by the weights of its version."""
        worst = 0.0
        for row in range(min(CHECKED, len(batch))):
            one = batch.select([len(batch) - 1 - row])
            tokens, acted = one["token_ids"].long(), one["action_mask"]
            for version in set(one["weight_version"][acted].tolist()):
                logits = self.models[version](input_ids=tokens[None]).logits[0].float()
                expected = torch.log_softmax(logits, -1)[:-1].gather(1, tokens[1:, None])[:, 0]
                mine = acted[1:] & (one["weight_version"][1:] == version)
                difference = (expected - one["rollout_log_probs"][1:]).abs()[mine]
                worst = max(worst, float(difference.max()))
        return worst


class WindowKiller(Killer):
    """Kills one engine after each step that is taken and one in each update, and checks what each step gets."""

    def __init__(self, trainer: PpoTrainer, pids: Callable[[int], int], wanted: Counter[str]) -> None:
        self._collect = trainer.mode.collect
        super().__init__(trainer, pids, wanted, seed=0)
        self.lasted["generating"] = 0.0  # a call of the self-check is not killed
        start = trainer.run_directory.path / "rollout-start"
        shapes = trainer.groups.policy.save_without_weights(str(start)).result()
        self.oracle = Oracle(start, shapes)
        self.apart, self.mixed = 0.0, 0
        self._victims: list[tuple[int, int]] = []
        mock.patch.object(trainer.mode, "collect", self.collect).start()

    def generate(self, requests: Any, deadline_s: float) -> TrajectoryBatch:
        return self._generate(requests, deadline_s)

    def update_weights(self, version: int, weights: PublishedWeights) -> None:
        self.oracle.keep(weights)
        super().update_weights(version, weights)

    def collect(self, step: int, version: int, phase: Any) -> Collected:
        began = time.monotonic()
        collected = self._collect(step, version, phase)
        print(f"step {step}: its answers were there after {time.monotonic() - began:.1f} s", flush=True)
        batch, samples = collected.trajectories, self.trainer.config.batch.samples_per_prompt
        expected = Counter({(prompt.prompt_id, sample) for prompt in collected.prompts for sample in range(samples)})
        found = Counter(zip(batch["prompt_id"].tolist(), batch["sample_index"].tolist(), strict=True))
        assert found == expected, "a sample is missing or doubled"
        self.apart = max(self.apart, self.oracle.apart(batch))
        assert self.apart < AGREES, f"step {step}: a log-prob is {self.apart} from that of its version's weights"
        for row in range(len(batch)):
            one = batch.select([row])
            self.mixed += len(set(one["weight_version"][one["action_mask"]].tolist())) > 1
        self._count_victims()
        if self.done["generating"] + len(self._victims) < self.wanted["generating"] and self._candidates():
            self._kill_one(self._rng.choice(self._candidates()))
        return collected

    def _kill_one(self, victim: int) -> None:
        process = victim, self.fleet.health[victim].incarnation
        try:
            pid = self.pids(victim)
        except GroupError:  # it has just died
            return
        self._victims.append(process)
        threading.Timer(self._rng.uniform(0, LATEST_S), os.kill, [pid, signal.SIGKILL]).start()

    def _candidates(self) -> tuple[int, ...]:
        """Engines that are not about to be killed already."""
        health = self.fleet.health
        return tuple(one for one in health.healthy if (one, health[one].incarnation) not in self._victims)

    def _count_victims(self) -> None:
        died = [one for one in self._victims if self.fleet.health.has_died(*one)]
        self.done["generating"] += len(died)
        self._victims = [one for one in self._victims if one not in died]

    def expect_all_well(self) -> None:
        deadline = time.monotonic() + 150
        while self._victims and time.monotonic() < deadline:  # a death is found out after a while
            self.fleet.heal()
            self._count_victims()
            time.sleep(0.1)
        super().expect_all_well()
        assert self.mixed > 0, "no answer went on under new weights"


def campaign(root: Path, kills: int, *overrides: str) -> WindowKiller:
    """Run until all kills were made. Raises AssertionError where something was lost."""
    steps = 4 * kills + 8  # many a kill in an update comes too late
    settings = [f"run.root={root}", "run.name=kills", "monitoring.ray_metrics=false", f"steps={steps}", "cluster.num_cpus=2",
                "run.deterministic=false", "rollout.mode=windowed", "rollout.partial=true", "rollout.max_restarts=1000",
                "rollout.max_new_tokens=48", "rollout.max_model_tokens=96", "rollout.max_num_seqs=4", "policy.ranks=1",
                "data.world={prompts: 16, evaluation_prompts: 4}", "evaluation={prompts: 4}", "checkpoint.every_steps=null",
                "batch={prompts_per_step: 8, samples_per_prompt: 2, sequences_per_update: 16, max_tokens_per_micro_batch: 999}",
                ]  # fmt: skip
    config = load_config(str(CONFIG), [*settings, *overrides], kind="ppo")
    wanted = Counter(generating=kills, updating=kills)
    killers: list[WindowKiller] = []
    original, finish = build.build, PpoTrainer.finish

    def watched(*arguments: Any) -> PpoTrainer:
        trainer = original(*arguments)
        engines = trainer.publisher._engines
        pids = lambda one: int(engines[one].call("health", [()]).result()[0]["pid"])  # noqa: E731
        killers.append(WindowKiller(trainer, pids, wanted))
        return trainer

    def checked(trainer: PpoTrainer) -> None:
        killers[0].expect_all_well()
        finish(trainer)  # it holds the ledger against the prompts

    with mock.patch.object(build, "build", watched), mock.patch.object(PpoTrainer, "finish", checked):
        train_new_run(dump_config(config))
    oldest = max(line.get("rollout/staleness", 0) for line in RunDirectory.open(root / "kills").metrics.read())
    assert oldest <= config.rollout.window, f"a token is {oldest} publications old"
    return killers[0]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the campaign with vLLM engines, or those of ``--backend``."""
    parser = argparse.ArgumentParser(prog="tests.faults.window_kills", description="kill engines that never pause")
    parser.add_argument("--kills", type=int, default=10, help="kills of each kind (default 10)")
    parser.add_argument("--backend", choices=["vllm", "transformers"], default="vllm")
    options = parser.parse_args(arguments)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rlhf-ray-kills-") as root:
        backend = f"rollout.backend={options.backend}"
        killer = campaign(Path(root), options.kills, backend)
    print(
        f"{dict(killer.done)}, {killer.late} too late: nothing was lost; log-probs at most {killer.apart:.1e} from those of "
        f"their versions, {killer.mixed} answers of more than one version, in {time.monotonic() - began:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
