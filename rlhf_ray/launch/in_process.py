"""A job in this one process, the driver and every rank, so that a debugger reaches them all: ``rlhf-ray train --in-process``.

Invariants: no Ray is started and no other process drives the run; every role has one rank; a job that cannot run like this
is refused before anything is loaded, with the way out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_ray import environment
from rlhf_ray.config.checks.one_process import no_role_scores_in_vllm
from rlhf_ray.config.jobs.base import Job, TrainingJob
from rlhf_ray.config.jobs.generate import GenerateConfig
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.loading import dump_config, parse_config
from rlhf_ray.config.paths import with_absolute_paths
from rlhf_ray.config.preflight import hub_ids
from rlhf_ray.config.problems import Problem, attempt
from rlhf_ray.console import get_logger
from rlhf_ray.errors import ConfigError
from rlhf_ray.processes import stacks

if TYPE_CHECKING:
    from rlhf_ray.actors.this_process import ThisProcess


def train_in_process(config: TrainingJob) -> None:
    """Train ``config`` in this process; an error is raised as it is, with its traceback."""
    config = for_one_process(with_absolute_paths(config, Path.cwd()))
    os.environ.update(rank_environment(config))  # before torch is imported, which reads some of it once

    from rlhf_ray.actors.this_process import ThisProcess
    from rlhf_ray.launch.driver import train_new_run

    stacks.offer("driver and ranks")
    train_new_run(dump_config(config), place=ThisProcess(config.cluster))


def place_for_scoring(config: ServeConfig) -> ThisProcess:
    """This process as the place of the one rank of ``config.reward``; :class:`ConfigError` if it cannot be that."""
    problems = list(no_role_scores_in_vllm(config.roles()))
    if config.reward.ranks > 1:
        problems.append(("reward.ranks", f"{config.reward.ranks} ranks need processes of their own: set it to 1"))
    if problems:
        raise ConfigError([f"{key}: {text}" for key, text in problems], "in_process")

    os.environ["DS_ACCELERATOR"] = config.reward.resources.device  # DeepSpeed reads it once, when it is imported
    from rlhf_ray.actors.this_process import ThisProcess

    return ThisProcess(config.cluster)


def place_for_generating(config: GenerateConfig) -> ThisProcess:
    """This process as the place of every engine and reward model of ``config``; :class:`ConfigError` if it cannot be that."""
    problems = attempt([*config.one_process_rules(), lambda: _one_device(config)], partial=False)
    for key, role in config.roles().items():
        if role.config.ranks > 1:
            problems.append((f"{key}.ranks", f"{role.config.ranks} ranks need processes of their own: set it to 1"))
    if problems:
        raise ConfigError([f"{key}: {text}" for key, text in problems], "--in-process")
    os.environ.update(rank_environment(config))  # before torch is imported, which reads some of it once
    from rlhf_ray.actors.this_process import ThisProcess

    return ThisProcess(config.cluster)


def for_one_process(config: TrainingJob) -> TrainingJob:
    """``config`` with one rank for every role and without the metrics that need Ray.

    Raises :class:`ConfigError` if a part of the job needs a process of its own.
    """
    problems = attempt([*config.one_process_rules(), lambda: _one_device(config)], partial=False)
    if problems:
        raise ConfigError([f"{key}: {text}" for key, text in problems], "--in-process")
    changes = [f"{key}.ranks=1" for key, role in config.roles().items() if role.config.ranks > 1 and not role.derived]
    if config.monitoring.ray_metrics:
        changes.append("monitoring.ray_metrics=false")
    if not changes:
        return config
    get_logger().info("all in one process: %s", ", ".join(changes))
    return parse_config(dump_config(config), changes).to_train()


def rank_environment(config: Job) -> dict[str, str]:
    """The environment variables that the ranks of ``config`` would get in processes of their own, all on the same device."""
    resources = [placement.resources for placement in config.placements()]
    return environment.for_process(
        threads=max(one.threads_per_rank for one in resources), hub=bool(hub_ids(config)), device=resources[0].device
    )


def _one_device(config: Job) -> Iterator[Problem]:
    """DeepSpeed and torch's groups have one device in a process, so every role computes on that of the first."""
    (first, device), *others = {placement.name: placement.resources.device for placement in config.placements()}.items()
    for name, other in others:
        if other != device:
            yield (
                f"{name}.resources.gpus_per_rank",
                f"the {name} is placed on {other} and the {first} on {device}, but one process has one device: give all of "
                "them a GPU, or none",
            )
