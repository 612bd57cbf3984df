"""PPO on the whole stack, with every role on one GPU, side by side or by turns, or the rollout engine on a second one.

Always true: weights reach the engine after every update, from GPU to GPU, and trainer and engine agree on log-probs as
far as bf16 lets them.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from rlhf_ray.actors.publisher import WAYS
from rlhf_ray.environment import Device
from rlhf_ray.rollout.transport import Transport
from rlhf_ray.runs.directory import RunDirectory
from tests.gpu.sizes import Sizes

CONFIG = Path(__file__).parents[1] / "e2e" / "ppo_tiny.yaml"
STEPS = 3
DEADLINE_S = 280
AGREES_TO = 0.02
"""Nats between trainer and engine, in the mean over tokens, that bf16 explains at this size."""
ROLES = ("policy", "critic", "reference", "reward")
OVERRIDES = (
    f"steps={STEPS}", "run.deterministic=false", "policy.ranks=1", "policy.engine.zero=2", "checkpoint.every_steps=0",
    *(f"{role}.model.dtype=bf16" for role in ROLES), *(f"{role}.resources.gpus_per_rank=0.15" for role in ROLES),
    *(f"{role}.model.make.shape=llama-14m" for role in ROLES),
    "rollout.engines=1", "rollout.dtype=bf16", "rollout.resources.gpus_per_rank=0.4",
    "rollout.gpu_memory_utilization=0.3",
)  # fmt: skip
"""One rank a role: NCCL serves one rank a GPU; a head size that GPU kernels serve."""


OF_ITS_OWN = ("rollout.resources.gpus_per_rank=1", "rollout.gpu_memory_utilization=0.5")
"""For an engine on a GPU of its own."""
BY_TURNS = ("cluster.colocate=true", "critic.engine.zero=2", "rollout.gpu_memory_utilization=0.8")
"""For roles that take turns: the engine may have most of the GPU while it generates."""
TRANSPORTS: dict[int, Transport] = {1: "ipc", 2: "nccl"}
"""How weights should travel, by the number of GPUs."""


def train_ppo(device: Device, sizes: Sizes, *, gpus: int, by_turns: bool = False) -> str:
    """Some steps of PPO by command; says how far trainer and engine were apart."""
    overrides = OVERRIDES + (OF_ITS_OWN if gpus > 1 else ()) + (BY_TURNS if by_turns else ())
    with tempfile.TemporaryDirectory() as root:
        command = [sys.executable, "-m", "rlhf_ray", "train", "ppo", str(CONFIG), f"run.root={root}", *overrides]
        done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S)
        if done.returncode != 0:
            raise AssertionError(
                f"rlhf-ray train ppo ended with {done.returncode}:\n{(done.stdout + done.stderr)[-6000:]}"
            )
        if WAYS[TRANSPORTS[gpus]] not in done.stdout + done.stderr:
            raise AssertionError(f"weights did not go {WAYS[TRANSPORTS[gpus]]}:\n{(done.stdout + done.stderr)[-6000:]}")
        lines = RunDirectory.open(Path(root) / "tiny").metrics.read()
    steps = [line for line in lines if "reward/learned" in line]
    apart = max((step["rollout/log_prob_difference_mean"] for step in steps), default=float("inf"))
    versions = [step["weights/version"] for step in steps]
    if versions != list(range(1, STEPS + 1)) or not apart <= AGREES_TO:
        raise AssertionError(f"weight versions {versions}, log-probs {apart:.3g} apart (limit {AGREES_TO})")
    return f"{STEPS} steps, log-probs of trainer and engine at most {apart:.2g} apart in the mean"
