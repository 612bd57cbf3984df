"""What a job needs from outside its config: files on this machine, and names that only a hub has.

Invariant: nothing is loaded, started or downloaded.
"""

from __future__ import annotations

from rlhf_ray.config.jobs.base import Job
from rlhf_ray.config.problems import attempt
from rlhf_ray.environment import is_hub_id


def check_files(config: Job) -> list[str]:
    """Every problem with the files that ``config`` names, one message each."""
    return [f"{key}: {text}" for key, text in attempt(config.files(), partial=False)]


def hub_ids(config: Job) -> list[str]:
    """The models and data sets of ``config`` that only a hub can have, so that the job must be allowed to ask it."""
    names = [model.path for _, model in config.model_sections()]
    names += [path for _, path in config.data_paths()]
    return sorted({name for name in names if name is not None and is_hub_id(name)})
