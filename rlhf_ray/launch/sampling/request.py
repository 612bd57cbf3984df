"""What is asked of ``generate`` and ``rescore`` on a command line or from Python, as configs of their jobs.

Invariant: it reads values alone; nothing is loaded or started.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_ray.config.jobs.generate import GenerateConfig
from rlhf_ray.config.jobs.ppo import source_files
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.loading import load_job
from rlhf_ray.config.overrides import apply_overrides
from rlhf_ray.config.reading import Document
from rlhf_ray.config.sections.rewards import SHIPPED_FUNCTIONS, RewardConfig
from rlhf_ray.config.validation import parse
from rlhf_ray.errors import ConfigError

if TYPE_CHECKING:
    from rlhf_ray.launch.sampling.rescore import RescoreReport

RECIPE = "generate"


def reward_keys(reward: str | None) -> dict[str, Any]:
    """The keys that ``--reward`` stands for: a service by its URL, a function by its name, or else a reward model."""
    if reward is None:
        return {}
    if reward.startswith(("http://", "https://")):
        return {"reward.url": reward}
    if ":" in reward or reward in SHIPPED_FUNCTIONS:
        return {"reward.function": reward}
    return {"reward.model.path": reward, "reward.model.dtype": "fp32"}


def generate_config(
    model: str | Path,
    prompts: str | Path | None = None,
    *,
    recipe: str | Path = RECIPE,
    reward: str | None = None,
    overrides: Sequence[str] = (),
    **keys: Any,
) -> GenerateConfig:
    """The job that answers ``prompts`` with ``model``; ``keys`` are keys of the job, and one that is None is not given.

    Raises :class:`ConfigError` with every problem.
    """
    given: dict[str, Any] = {"model.path": str(model), **reward_keys(reward), **keys}
    if prompts is not None:
        given["data.path"] = str(prompts)
    texts = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    return load_job(GenerateConfig, str(recipe), [*texts, *overrides], files=True)


def other_reward(reward: str, overrides: Sequence[str] = ()) -> ServeConfig | RewardConfig:
    """What scores again: a job that loads a reward model, or the ``reward`` section of a service or a function.

    Raises :class:`ConfigError` with every problem.
    """
    keys = reward_keys(reward)
    texts = [*(f"{key}={json.dumps(value)}" for key, value in keys.items()), *overrides]
    if "reward.model.path" in keys:
        return load_job(ServeConfig, "serve", ["run.name=rescore", *texts], files=True)
    document = Document()
    apply_overrides(document, texts)
    parsed = parse(RewardConfig, document.values.get("reward", {}))
    problems = [*document.problems, *(f"reward.{key}: {problem}" for key, problem in parsed.problems)]
    given = document.values.get("reward", {})
    problems += [
        f"reward.{key}: it is about the prompts of a training step: remove it"
        for key in ("on_failure", "max_dropped_share")
        if isinstance(given, dict) and key in given
    ]
    others = sorted(key for key in document.values if key != "reward")
    problems += [f"{key}: a service or a function has keys of reward alone: remove it" for key in others]
    problems += [f"{key}: {text}" for key, text in (source_files("reward", parsed.config) if not problems else ())]
    if problems:
        raise ConfigError(problems, "command line")
    return parsed.config


def rescore_samples(samples: str | Path, reward: ServeConfig | RewardConfig) -> RescoreReport:
    """Score the samples of a run, or of a file of answers, with ``reward``, and compare."""
    from rlhf_ray.launch.sampling.rescore import read_samples, rescore_with, rescore_with_model

    kept = read_samples(samples)
    if isinstance(reward, ServeConfig):
        return rescore_with_model(reward, kept)
    return rescore_with(reward, kept)
