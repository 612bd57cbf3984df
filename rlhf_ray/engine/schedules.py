"""The learning rate of each optimizer update.

Invariants: the learning rate is a pure function of the number of the update, so a skipped update repeats it and a resumed run
continues it. A schedule that depends on the length of the run is refused if the length is not known.
"""

from __future__ import annotations

import math

from rlhf_ray.config.sections.engine import OptimizerConfig
from rlhf_ray.errors import RequestError

TIMESCALE = 10_000
"""The time scale of ``inverse_sqrt``, in updates, if there is no warm-up: the default of transformers."""


def check_schedule(config: OptimizerConfig, total_updates: int | None) -> None:
    """Refuse a schedule that needs the number of updates if it is unknown, and a run without updates."""
    if total_updates is not None and total_updates < 1:
        raise RequestError(f"total_updates is {total_updates}, but a run has at least one optimizer update")
    if total_updates is None and (config.schedule != "constant" or config.warmup_fraction > 0):
        raise RequestError(
            f"schedule {config.schedule} with warmup_fraction {config.warmup_fraction:g} needs the number of updates of "
            "the run: use schedule constant and warmup_fraction 0, or a run whose length is known"
        )


def learning_rate(config: OptimizerConfig, update: int, total_updates: int | None) -> float:
    """Return the learning rate of update number ``update``, counted from 0.

    It rises linearly over ``warmup_fraction`` of the run and reaches its peak at the last update of that. Then it follows the
    schedule down to ``final_fraction`` of the peak at the last update of the run, and stays there.
    """
    check_schedule(config, total_updates)
    if total_updates is None:
        return config.learning_rate
    warmup = math.ceil(config.warmup_fraction * total_updates)
    if update < warmup:
        return config.learning_rate * (update + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    if config.schedule == "inverse_sqrt":
        timescale = warmup or TIMESCALE
        return config.learning_rate * math.sqrt(timescale / (update - warmup + timescale))
    decay = total_updates - 1 - warmup
    progress = min(1.0, (update - warmup) / decay) if decay > 0 else 0.0
    share = share_left(config, progress, warmup / total_updates)
    return config.learning_rate * (config.final_fraction + (1.0 - config.final_fraction) * share)


def share_left(config: OptimizerConfig, progress: float, warmup: float) -> float:
    """Return how much of the way from the peak down to the final learning rate is left, from 1 to 0.

    ``progress`` is the share of the time after the warm-up that has passed, ``warmup`` the share of the run that the warm-up
    took. The forms of the schedules are those of transformers.
    """
    if config.schedule == "linear":
        return 1.0 - progress
    if config.schedule == "polynomial":
        return math.pow(1.0 - progress, config.power)
    if config.schedule == "cosine_with_restarts" and progress < 1.0:
        return _cosine((progress * config.restarts) % 1.0)
    if config.schedule == "warmup_stable_decay":
        decay = min(1.0, config.decay_fraction / (1.0 - warmup)) if warmup < 1.0 else 1.0
        return 1.0 if progress <= 1.0 - decay else _cosine((progress - 1.0 + decay) / decay)
    return _cosine(progress)


def _cosine(progress: float) -> float:
    return 0.5 * (1.0 + math.cos(math.pi * progress))
