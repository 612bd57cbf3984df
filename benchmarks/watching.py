"""Part ``watching``: what it costs a run that it is watched.

Invariants: the job is that of ``rollout_modes`` in ``sync``, on the same two cores, with and without, in turns; with it come
spans of every process, the metrics on Ray's page, and a follower that feeds TensorBoard and a file of JSON lines. Alarms cannot
be switched off, so that both sides have them: a look is measured by itself, with all that is remembered of a run whose steps
take one second.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest.mock import patch

from benchmarks.figures import Figure, Figures
from benchmarks.rollout_modes import QUICK, REWARD, SKIPPED, run, settings
from rlhf_ray.config.loading import load_config
from rlhf_ray.monitoring.phases import PhaseClock
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers.alarm_watch import EVERY_S, REMEMBERED_S, AlarmWatch

ROUNDS = 3
WITH = ["monitoring.spans=true", "monitoring.ray_metrics=true"]
WITHOUT = ["monitoring.spans=false", "monitoring.ray_metrics=false", "monitoring.trackers=[]"]
LOOKS = 200
"""Among which are two that forget what is too old."""


def measure(quick: bool = False) -> Figures:
    """How much longer a step takes, and how much of a core the alarms do."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    rounds, lines = [], list[dict[str, float]]()
    for number in range(1 if quick else ROUNDS):
        both: dict[bool, float] = {}
        for watched in (False, True) if number % 2 == 0 else (True, False):
            lines = _lines(watched, quick)
            seconds[watched] += [line["time/step"] for line in lines]
            both[watched] = median(seconds[watched][-len(lines) :])
        rounds.append(both[True] / both[False] - 1.0)
    plain, watched_s = median(seconds[False]), median(seconds[True])
    look_s = seconds_of_a_look(lines[-1])
    return {
        "watching.share_of_a_step": Figure(
            watched_s / plain - 1.0, "share", False,
            f"GRPO of a Llama of 14M parameters with spans, Ray's metrics and two trackers against without: medians of "
            f"{len(seconds[True])} steps each, {watched_s:.3f} and {plain:.3f} s, in {len(rounds)} turns; a turn alone "
            f"gives {min(rounds):.2%} to {max(rounds):.2%}",
        ),
        "watching.alarms_share_of_a_core": Figure(
            look_s / EVERY_S, "share", False,
            f"{look_s * 1e3:.1f} ms of processor time for a look every {EVERY_S:g} s with {REMEMBERED_S:g} steps remembered, "
            f"mean of {LOOKS}; what is told to Ray is in the other figure",
        ),
    }  # fmt: skip


def _lines(watched: bool, quick: bool) -> list[dict[str, float]]:
    """The metrics of each step that counts."""
    with TemporaryDirectory() as fed:
        trackers = f"monitoring.trackers=[jsonl:{fed}/run.jsonl,tensorboard]"
        overrides = [*WITH, trackers] if watched else WITHOUT
        return run("sync", [*overrides, *(QUICK if quick else [])])[0 if quick else SKIPPED :]


def seconds_of_a_look(line: dict[str, float]) -> float:
    """The mean processor seconds of a look at a run whose every step had these metrics and took a second."""
    with TemporaryDirectory() as name:
        root = Path(name)
        directory = RunDirectory.create(root / "run", "kind: ppo\n")
        (root / "reward.py").write_text(REWARD)
        (root / "config.json").write_text(json.dumps(settings(root, "sync")))
        watch = AlarmWatch(directory, load_config(root / "config.json", [], kind="ppo"), PhaseClock())
        now = time.time()
        with patch("time.time") as clock:
            for step in range(1, int(REMEMBERED_S) + 1):
                clock.return_value = now - REMEMBERED_S + step
                watch.log(step, {**line, "step": float(step)})
        began = time.thread_time()
        for _ in range(LOOKS):
            watch.look()
        took = time.thread_time() - began
        directory.release()
    return took / LOOKS
