"""How old answers are on average when a step learns from them, by the mode and by how long sampling and learning take.

An answer's age is the number of publications between the weights that sampled it and those that learn from it. By Little's law
its mean is the mean number of answers that were begun and not learned from, at the publications, over the answers of a step.

Invariants: no mean is above the mode's bound. In ``sync`` and ``one_step_off`` times do not matter and the mean is exact; in
``windowed`` it is that of the steady state, exact where all steps take the same times and every step publishes.
"""

from __future__ import annotations

import math
from typing import Literal

from rlhf_ray.config.jobs.base import Job
from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.console import table
from rlhf_ray.planning.job_memory import Files, weights_here
from rlhf_ray.planning.step_time import step_seconds


def mean_staleness(
    mode: Literal["sync", "one_step_off", "windowed"],
    *,
    steps: int,
    window: int = 1,
    sampling_s: float = 1.0,
    learning_s: float = 1.0,
    slices: int = 4,
) -> float:
    """Return the mean age of the answers of a run of ``steps`` steps, in publications.

    A step is sampled in ``sampling_s`` seconds, in ``slices`` parts one after the other, and learned from in ``learning_s``.
    ``one_step_off``: every step but the first learns from answers that are one publication old. ``windowed``: where engines are
    not slower than the trainer the window is full, and all answers are as old as it is. Where they are slower the trainer
    waits: what of a step was begun while the one before it learned, is one publication old, and the rest is new.
    Times that vary move the mean: little in general, but by up to a slice where learning takes a whole number of slices, and
    towards either side where sampling and learning take equally long.

    Raises ``ValueError`` for a size or time that is not above 0.
    """
    for name, value in (
        ("steps", steps), ("window", window), ("sampling_s", sampling_s), ("learning_s", learning_s), ("slices", slices),
    ):  # fmt: skip
        if not value > 0:
            raise ValueError(f"{name} is {value:g}, but it must be above 0")
    if mode == "sync":
        return 0.0
    if mode == "one_step_off":
        return 1.0 - 1.0 / steps
    if mode != "windowed":
        raise ValueError(f"mode {mode!r} is unknown: use sync, one_step_off or windowed")
    if sampling_s <= learning_s:
        return float(window)
    return math.ceil(learning_s / sampling_s * slices) / slices


def staleness_table(config: Job, files: Files = weights_here) -> str | None:
    """The mean age of a job's answers as a table; none for a job that does not sample.

    Times of sampling and learning are those of :func:`~rlhf_ray.planning.step_time.step_seconds`, at the rates of an H100.
    """
    if not isinstance(config, PpoConfig):
        return None
    rollout = config.rollout
    times = step_seconds(config, files) if rollout.mode == "windowed" else {}
    bound = f"at most {rollout.staleness}, in mode {rollout.mode}"
    if rollout.mode == "windowed" and not times:
        value, follows = f"up to {rollout.window}", f"{bound}; the sizes of the models are not known"
    else:
        sampling_s = times.get("rollout", 1.0)
        learning_s = times.get("scores", 0.0) + times.get("updates", 1.0)
        mean = mean_staleness(
            rollout.mode,
            steps=config.steps,
            window=rollout.window,
            sampling_s=sampling_s,
            learning_s=learning_s,
            slices=slices_of(rollout, config.batch.prompts_per_step),
        )
        value = f"{mean:.2f}"
        follows = bound if not times else f"{bound}; sampling {sampling_s:.1f} s, learning {learning_s:.1f} s (H100)"
    return table("staleness", ("what", "publications", "from"), [("mean age of answers", value, follows)])


def slices_of(rollout: RolloutConfig, prompts_per_step: int) -> int:
    """In how many parts mode ``windowed`` samples a step."""
    return math.ceil(prompts_per_step / rollout.prompts_per_slice(prompts_per_step))
