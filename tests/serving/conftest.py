"""A tiny reward model on disk, and as a reward group of one rank in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rlhf_ray import environment
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.config.sections.run import RunConfig

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from rlhf_ray.actors.groups import RewardGroup

    from .reward_models import Reference

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


@pytest.fixture(scope="module")
def torch_threads() -> Iterator[None]:
    """Torch has as many threads afterwards as before: a rank takes as many as it is given."""
    import torch

    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def groups() -> dict[Path, RewardGroup]:
    """Reward groups that are loaded, by the directory of their model."""
    return {}


@pytest.fixture
def group(model: Path, config: Callable[..., ServeConfig], groups: dict[Path, RewardGroup]) -> RewardGroup:
    """The reward model's only rank, in this process; loaded once."""
    from .served_model import load

    if model not in groups:
        groups[model] = load(model, config)
    return groups[model]


@pytest.fixture
def app(group: RewardGroup, config: Callable[..., ServeConfig], model: Path) -> Callable[..., Starlette]:
    """``app(max_items=3, ...)``: the scoring app over the group."""
    from .served_model import backend_of
    from .services import service

    def make(**values: object) -> Starlette:
        settings = config(str(model), **values)
        return service(settings, backend_of(group, settings))

    return make


@pytest.fixture(scope="session")
def reference(model: Path) -> Reference:
    """The same model's scores as transformers computes them."""
    from .reward_models import Reference

    return Reference(model)
