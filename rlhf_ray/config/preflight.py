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


def hub_names(config: Job) -> list[tuple[str, str]]:
    """The models and data sets of ``config`` that only a hub can have, each after its key; no check looks at them."""
    models = [(f"{key}.path", model.path) for key, model in config.model_sections() if model.path is not None]
    return [(key, name) for key, name in [*models, *config.data_paths()] if is_hub_id(name)]


def hub_ids(config: Job) -> list[str]:
    """Their names: where there are any, the job must be allowed to ask the hub."""
    return sorted({name for _, name in hub_names(config)})
