"""A tiny reward model, scored by a real worker in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray import environment
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.config.sections.run import RunConfig

environment.prepare()


@pytest.fixture
def config() -> Callable[..., ServeConfig]:
    """``config(max_items=3, ...)``: a service of the model directory ``path``."""

    def make(path: str = "model", **values: object) -> ServeConfig:
        role = ScoringRole(model=ModelConfig(path=path, dtype="fp32"))
        return ServeConfig(kind="serve", run=RunConfig(name="test"), reward=role, **values)

    return make


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model's directory."""
    from .reward_models import save_reward_model

    return save_reward_model(tmp_path_factory.mktemp("reward"))
