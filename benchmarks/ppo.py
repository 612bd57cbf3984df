"""Part ``ppo``: samples a second of a synchronous PPO step against TRL's PPOTrainer and against an earlier build.

Invariants: all sides start from the same weights, sample 64 tokens after the same prompts of 81 tokens, make the same number
of updates with policy and critic, and have the same two cores. They run one after the other; the first step of each, which
warms up, does not count. TRL counts with the faster of its two ways to compute in bf16. Like TRL's, a step of this build
takes the old log-probs of the rollout, and its logits are bf16; the earlier build computes the former once more and the
latter in fp32, since it has no other way. Both builds have one rank of each role, of one thread, so that policy and critic
update at the same time on a core each, and an engine on each core.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.figures import Figure, Figures
from benchmarks.peers.line_process import LineProcess
from benchmarks.peers.ppo_material import PROMPT_TOKENS, SIZES, VOCABULARY, Material, make_material
from benchmarks.processor_seconds import per_step, watch
from benchmarks.sequences import REAL_PAIRS
from rlhf_ray.engine.matmul_rate import matmul_rate
from rlhf_ray.environment import for_process
from tests.parity import environment

ROOT = Path(__file__).parents[1]
EARLIER = "e643d91"
SAMPLES, NEW_TOKENS, UPDATES, THREADS, RANKS = 64, 64, 4, 2, 1
ROLLOUT_LOG_PROBS = {"old_log_probs": "rollout", "importance": {"level": "none"}}
LEARNING_RATE, KL = 1e-6, 0.05
STEPS = 6


def measure(quick: bool = False) -> Figures:
    """The ratios to TRL and to the earlier build; ``quick`` runs two steps of this build alone."""
    if not REAL_PAIRS.is_file():
        raise FileNotFoundError(f"{REAL_PAIRS} is not there: PPO is measured on real prompts")
    with TemporaryDirectory() as name:
        material = make_material(Path(name), REAL_PAIRS)
        if quick:
            return _alone(run(ROOT, material, "now", steps=2))
        torch.set_num_threads(THREADS)
        roof = products() / matmul_rate(torch.bfloat16, torch.device("cpu"))
        ours = watched_run(ROOT, material, "now")
        weights, autocast = (_trl(material, autocast=autocast) for autocast in (False, True))
        with checkout(EARLIER) as earlier:
            before = run(earlier, material, "earlier")
    return {**_ratios(ours.steps, before, weights, autocast), **profile(ours, roof)}


@dataclass(frozen=True)
class Measured:
    """What a run took."""

    steps: list[dict[str, float]]
    """The metrics of each step but the first."""
    processors: Mapping[str, float]
    """Processor seconds of a step by role, a mean over the same steps."""


def run(root: Path, material: Material, name: str, *overrides: str, steps: int = STEPS) -> list[dict[str, float]]:
    """The metrics of each step but the first of a run of the build below ``root``."""
    return watched_run(root, material, name, *overrides, steps=steps).steps


def watched_run(root: Path, material: Material, name: str, *overrides: str, steps: int = STEPS) -> Measured:
    """Run the build below ``root``."""
    home = material.prompts.parent
    config = home / f"{name}.yaml"
    content = _config(material, home, name, steps)
    if root == ROOT:  # the earlier build has no such keys
        content["algorithm"] |= ROLLOUT_LOG_PROBS
        for role in ("policy", "reference"):
            content[role]["model"] = {**content[role]["model"], "head_dtype": "model"}
    config.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    command = [sys.executable, "-m", "rlhf_ray", "train", "ppo", str(config), *overrides]
    metrics = home / name / "metrics.jsonl"
    with subprocess.Popen(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}) as process:
        ends = watch(lambda: process.poll() is not None, process.pid, metrics)
    if process.returncode != 0:
        raise subprocess.CalledProcessError(process.returncode, command)
    measured = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    return Measured([each for each in measured if "time/step" in each][1:], per_step(ends))


def products() -> float:
    """Floating-point operations of the matrix products of a step, without those of attention.

    Through the layers go: sampling, three scoring passes, and two updates, whose backward passes count twice. Through the
    output layer, for new tokens: sampling, the reference's pass, and the update of the policy.
    """
    hidden, inner = int(SIZES["hidden_size"]), int(SIZES["intermediate_size"])
    layers = int(SIZES["num_hidden_layers"]) * (4 * hidden**2 + 3 * hidden * inner)
    tokens, new = SAMPLES * (PROMPT_TOKENS + NEW_TOKENS), SAMPLES * NEW_TOKENS
    return 2.0 * ((1 + 3 + 2 * 3) * layers * tokens + (1 + 1 + 3) * VOCABULARY * hidden * new)


PHASES = ("rollout", "scoring", "log_probs", "update", "weights")


def profile(ours: Measured, roof: float) -> Figures:
    """Where the seconds of a step go: by phase, by process, and beside ``roof``, the seconds that its products take at best."""
    step = _seconds(ours.steps)
    what, steps = "a step as in ppo.samples_per_second_vs_trl", len(ours.steps)
    method, average = f"{what}, median of {steps}", f"{what}, mean of {steps}"
    phases = {name: median(each[f"time/{name}"] for each in ours.steps) for name in PHASES}
    named = median(sum(each[f"time/{name}"] for name in PHASES) / each["time/step"] for each in ours.steps)
    busy = sum(ours.processors.values()) / (THREADS * mean(each["time/step"] for each in ours.steps))
    return {
        "ppo.step_seconds": Figure(step, "s", False, method),
        **{f"ppo.{name}_seconds": Figure(value, "s", False, f"phase of {method}") for name, value in phases.items()},
        "ppo.phases_share": Figure(named, "share", True, f"of the seconds of a step those that a phase has; {method}"),
        **{
            f"ppo.processor_seconds.{role}": Figure(value, "s", False, f"of all processes of the role; {average}")
            for role, value in ours.processors.items()
        },
        "ppo.busy_share": Figure(busy, "share", True, f"processor seconds of all processes, of {THREADS} cores; {average}"),
        "ppo.share_of_roof": Figure(
            roof / step, "share", True, f"{roof:.2f} s for the matrix products at the rate of large ones in bf16; {method}"
        ),
    }  # fmt: skip


def _config(material: Material, home: Path, name: str, steps: int) -> dict[str, Any]:
    language = {"path": str(material.policy), "dtype": "bf16"}
    scalar = {"path": str(material.reward), "dtype": "bf16"}
    optimizer = {"optimizer": {"learning_rate": LEARNING_RATE}}
    resources = {"cpus_per_rank": 0.1}
    return {
        "kind": "ppo",
        "run": {"root": str(home), "name": name},
        "steps": steps,
        "policy": {"model": language, "engine": optimizer, "resources": resources, "ranks": RANKS},
        "critic": {"model": scalar, "engine": optimizer, "resources": resources, "ranks": RANKS},
        "reference": {"model": language, "resources": resources, "ranks": RANKS},
        "reward": {"model": scalar, "resources": resources, "ranks": RANKS},
        "rollout": {
            "engines": THREADS, "max_new_tokens": NEW_TOKENS, "max_model_tokens": PROMPT_TOKENS + NEW_TOKENS + 7,
            "dtype": "bf16", "kv_cache_gib": 0.25, "resources": resources,
        },
        "data": {"path": str(material.prompts), "max_prompt_tokens": PROMPT_TOKENS},
        "batch": {
            "prompts_per_step": SAMPLES, "samples_per_prompt": 1, "sequences_per_update": SAMPLES // UPDATES,
            "passes_per_step": 1, "max_tokens_per_micro_batch": 4096,
        },
        "algorithm": {"kl": {"coefficient": KL}},
        "checkpoint": {"every_steps": 0},
        "monitoring": {"ray_metrics": False},
    }  # fmt: skip


def _trl(material: Material, *, autocast: bool) -> list[float]:
    """The seconds of each step of TRL's trainer but the first."""
    kept = {name: os.environ[name] for name in environment.KEPT if name in os.environ}
    command = [environment.python(), Path(__file__).parent / "peers" / "ppo_trl.py"]
    with LineProcess(command, kept | for_process(threads=THREADS)) as peer:
        peer.send(
            policy=str(material.policy), reward=str(material.reward), directory=str(material.prompts.parent / "trl"),
            prompts=material.ids, steps=3 if autocast else 4, samples=SAMPLES, updates=UPDATES, new_tokens=NEW_TOKENS,
            learning_rate=LEARNING_RATE, kl_coefficient=KL, autocast=autocast,
        )  # fmt: skip
        seconds: list[float] = peer.receive()["seconds"]
    return seconds


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """The files of a commit, for as long as the context lasts."""
    with TemporaryDirectory() as name:
        archive = subprocess.run(["git", "-C", ROOT, "archive", commit], check=True, stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", name], input=archive.stdout, check=True)
        yield Path(name)


def _seconds(steps: list[dict[str, float]]) -> float:
    return median(step["time/step"] for step in steps)


def _ratios(
    now: list[dict[str, float]], before: list[dict[str, float]], weights: list[float], autocast: list[float]
) -> Figures:
    ours, theirs = _seconds(now), min(median(weights), median(autocast))
    phases = ", ".join(
        f"{name} {median(step[f'time/{name}'] for step in now):.2f}"
        for name in ("rollout", "scoring", "log_probs", "update")
    )
    conditions = (
        f"Llama of 14.5M, {SAMPLES} real prompts of {PROMPT_TOKENS} tokens and {NEW_TOKENS} new ones a step, {UPDATES} updates "
        f"of policy and critic, bf16, {THREADS} cores; medians of the steps after the first; here {ours:.2f} s ({phases})"
    )
    trl = (
        f"seconds of TRL 1.12's PPOTrainer over ours: {median(weights):.1f} with bf16 weights, {median(autocast):.1f} with "
        f"autocast; {conditions}"
    )
    earlier = f"seconds of commit {EARLIER}, {_seconds(before):.2f}, over ours, on the same config; {conditions}"
    return {
        "ppo.samples_per_second_vs_trl": Figure(theirs / ours, "x", True, trl),
        "ppo.sync_vs_0_1": Figure(_seconds(before) / ours, "x", True, earlier),
    }


def _alone(steps: list[dict[str, float]]) -> Figures:
    rate = SAMPLES / _seconds(steps)
    return {"ppo.samples_per_second": Figure(rate, "/s", True, "one step after the first")}
