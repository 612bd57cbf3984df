"""How old answers are on average when a step learns from them, by the mode and by how long sampling and learning take.

An answer's age is the number of publications between the weights that sampled it and those that learn from it. By Little's law
its mean is the mean number of answers that were begun and not learned from, at the publications, over the answers of a step.

Invariants: no mean is above the mode's bound. In ``sync`` and ``one_step_off`` times do not matter and the mean is exact; in
``windowed`` it is that of the steady state, exact where all steps take the same times, answers end in the order in which they
were begun, and every step publishes.
"""

from __future__ import annotations

import math
from typing import Literal

from rlhf_ray.config.jobs.base import Job
from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.console import table
from rlhf_ray.planning.job_memory import Files, weights_here
from rlhf_ray.planning.step_time import H100, step_seconds


def mean_staleness(
    mode: Literal["sync", "one_step_off", "windowed"],
    *,
    steps: int,
    window: int = 1,
    sampling_s: float = 1.0,
    learning_s: float = 1.0,
    in_work: float = math.inf,
    longest: float = 1.0,
) -> float:
    """Return the mean age of the answers of a run of ``steps`` steps, in publications.

    A step takes engines that never pause ``sampling_s`` seconds, and the trainer ``learning_s`` from its answers to its
    publication. ``in_work`` is how many answers the engines sample at once, in steps (by default any number), and ``longest``
    the time of the answer that a step waits for, over that of a mean one.

    ``one_step_off``: every step but the first learns from answers that are one publication old. ``windowed``: where engines are
    not slower than the trainer the window is full, and all answers are as old as it is. Where they are slower the trainer
    waits. When it takes a step they have begun, of steps to come, what they sampled beside its longest answer, ``in_work *
    longest``, if the window had room; and until its publication ``learning_s / sampling_s`` more, besides what fills places
    that had stood empty, which are then filled all at once. This holds with ``rollout.partial`` and without. Where sampling and
    learning take about equally long, times that vary fill the window now and then, and the mean is higher.

    Raises ``ValueError`` for a size or time that is not above 0.
    """
    for name, value in (
        ("steps", steps), ("window", window), ("sampling_s", sampling_s), ("learning_s", learning_s), ("in_work", in_work),
        ("longest", longest),
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
    ahead = min(window - 1.0, in_work * longest)
    if ahead >= in_work:
        return min(float(window), ahead + learning_s / sampling_s)
    return min(float(window), max(in_work, (ahead + in_work) / 2 + learning_s / sampling_s))


def staleness_table(config: Job, files: Files = weights_here) -> str | None:
    """The mean age of a job's answers as a table; none for a job that does not sample.

    Times of sampling and learning are those of :func:`~rlhf_ray.planning.step_time.step_seconds`, at the rates of an H100, and
    so are the lengths of a mean answer and the longest.
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
            in_work=in_work(rollout, config.batch.prompts_per_step * config.batch.samples_per_prompt),
            longest=min(rollout.max_new_tokens, 2 * H100.answer) / min(rollout.max_new_tokens, H100.answer),
        )
        value, follows = f"{mean:.2f}", bound
        if times:
            most = "any number of" if rollout.max_num_seqs is None else rollout.engines * rollout.max_num_seqs
            follows += f"; sampling {sampling_s:.1f} s, learning {learning_s:.1f} s (H100), {most} answers at once"
    return table("staleness", ("what", "publications", "from"), [("mean age of answers", value, follows)])


def in_work(rollout: RolloutConfig, samples: int) -> float:
    """How many answers the engines sample at once, in steps of ``samples``; without limit where the config sets none."""
    return math.inf if rollout.max_num_seqs is None else rollout.engines * rollout.max_num_seqs / samples
