"""Part ``rollout_modes``: how much faster a step is in mode ``one_step_off`` than in ``sync``, and how old answers are in
``windowed`` beside the closed form that ``rlhf-ray plan`` prints.

Invariants: the rollout engine has one core for itself, and all other processes of the run share the other, in both modes. Both
run the same config, in turns. In ``sync`` generation takes about half of a step, which is measured and said beside the
figure. In ``windowed`` the engine samples fewer answers at once than a step has and is slower than the trainer, so that the age
depends on all that the closed form does.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from statistics import fmean, median

import psutil

from benchmarks.figures import Figure, Figures
from rlhf_ray.planning.staleness import mean_staleness

MODES = ("sync", "one_step_off")
ENGINE_CORE, TRAINER_CORE = 1, 0
STEPS, SKIPPED, ROUNDS = 8, 2, 1
"""Steps of a run, those at its start that are not counted, and runs of each mode."""
REWARD = "def length(responses):\n    return [len(response) % 7 / 7 for response in responses]\n"
SIZES = {"prompts_per_step": 5, "samples_per_prompt": 4, "sequences_per_update": 20, "max_tokens_per_micro_batch": 4096}
NEW_TOKENS = 224
WINDOW, AT_ONCE = 2, 8
WINDOWED = ["rollout.partial=true", f"rollout.window={WINDOW}", f"rollout.max_num_seqs={AT_ONCE}", "steps=12"]
FILLING = 4
"""Steps until the window is in its steady state."""
QUICK = ["steps=2", "rollout.max_new_tokens=4", "policy.model.make.shape=llama-tiny"]


def measure(quick: bool = False) -> Figures:
    """Run each mode in turn and compare the medians of their steps."""
    lines: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    for _ in range(1 if quick else ROUNDS):
        for mode in MODES:
            lines[mode] += run(mode, QUICK if quick else [])[0 if quick else SKIPPED :]
    seconds = {mode: median(line["time/step"] for line in lines[mode]) for mode in MODES}
    share = median(line["time/rollout"] / line["time/step"] for line in lines["sync"])
    method = (
        f"GRPO of a Llama of 14M parameters in bf16 on Ray with one vLLM engine, {SIZES['prompts_per_step']} prompts x "
        f"{SIZES['samples_per_prompt']} answers of up to {NEW_TOKENS} tokens a step, the engine pinned to one core and all "
        f"other processes to another; generation takes {share:.0%} of a step in sync; median of "
        f"{ROUNDS} x {STEPS - SKIPPED} steps of {seconds['sync']:.2f} s in sync and {seconds['one_step_off']:.2f} s in "
        "one_step_off"
    )
    return {
        "ppo.one_step_off_vs_sync": Figure(seconds["sync"] / seconds["one_step_off"], "ratio", True, method),
        "ppo.staleness_vs_closed_form": staleness(run("windowed", [*WINDOWED, *(QUICK if quick else [])])),
    }


def staleness(lines: list[dict[str, float]]) -> Figure:
    """The mean age of answers in a windowed run over that of the closed form, by the times that its steps took."""
    settled = lines[FILLING:-1] or lines[-1:]

    def mean(name: str) -> float:
        return fmean(line[name] for line in settled)

    samples = SIZES["prompts_per_step"] * SIZES["samples_per_prompt"]
    sampling_s, learning_s = mean("rollout/seconds"), mean("time/step") - mean("time/rollout")
    expected = mean_staleness(
        "windowed",
        steps=len(lines),
        window=WINDOW,
        sampling_s=sampling_s,
        learning_s=learning_s,
        in_work=AT_ONCE / samples,
        longest=max(NEW_TOKENS / mean("length/response"), 1.0),
    )
    measured = mean("rollout/staleness_mean")
    method = (
        f"the same job in windowed with rollout.partial, window {WINDOW}, {AT_ONCE} answers at once on one engine: mean age "
        f"{measured:.2f} over {len(settled)} steps, closed form {expected:.2f}, by {sampling_s:.2f} s of sampling and "
        f"{learning_s:.2f} s from the answers to the publication in a step of {mean('time/step'):.2f} s; the engine idle for "
        f"{mean('rollout/engines_idle'):.1%}"
    )
    return Figure(measured / expected, "ratio", True, method)


def run(mode: str, overrides: list[str], reward: str = REWARD) -> list[dict[str, float]]:
    """Train in one mode against the function ``length`` of the program ``reward``; returns the metrics of its steps."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        (root / "reward.py").write_text(reward)
        config = root / "modes.json"
        config.write_text(json.dumps(settings(root, mode)))
        command = [sys.executable, "-m", "rlhf_ray", "train", "ppo", str(config), *overrides]
        process = subprocess.Popen(command, cwd=Path(__file__).parents[1])
        over = threading.Event()
        pinning = threading.Thread(target=pin, args=(process.pid, over))
        pinning.start()
        try:
            if process.wait(timeout=600) != 0:
                raise RuntimeError(f"the run in mode {mode} ended with {process.returncode}")
        finally:
            over.set()
            pinning.join()
        path = root / "modes" / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        return [row for row in rows if "time/step" in row]


def settings(root: Path, mode: str) -> dict[str, object]:
    """The config of a run."""
    return {
        "kind": "ppo",
        "run": {"name": "modes", "root": str(root)},
        "steps": STEPS,
        "policy": {
            "model": {"make": {"shape": "llama-14m", "tokenizer_from": "world"}, "dtype": "bf16"},
            "engine": {"optimizer": {"learning_rate": 1e-6}},
            "resources": {"cpus_per_rank": 0.5},
        },
        "reward": {"function": f"{root}/reward.py:length"},
        "rollout": {"mode": mode, "max_new_tokens": NEW_TOKENS, "max_model_tokens": 288, "kv_cache_gib": 0.25,
                    "dtype": "bf16", "resources": {"cpus_per_rank": 0.5}},
        "data": {"world": {"prompts": 512, "evaluation_prompts": 4}, "max_prompt_tokens": 48},
        "batch": SIZES,
        "algorithm": {"name": "grpo", "kl": {"coefficient": 0.0, "measure": False}},
        "evaluation": {"prompts": 4},
        "checkpoint": {"every_steps": 0},
        "monitoring": {"ray_metrics": False},
    }  # fmt: skip


def pin(parent: int, over: threading.Event) -> None:
    """Give the engine a core of its own, and the other one to the rest, until the run is ``over``; libraries that start move
    their threads, so this is done again and again."""
    while not over.wait(0.5):
        with contextlib.suppress(psutil.Error):
            for process in [psutil.Process(parent), *psutil.Process(parent).children(recursive=True)]:
                with contextlib.suppress(psutil.Error, OSError):
                    is_engine = "RolloutActor" in " ".join(process.cmdline())
                    for thread in process.threads():
                        with contextlib.suppress(OSError):
                            os.sched_setaffinity(thread.id, {ENGINE_CORE if is_engine else TRAINER_CORE})
