"""A reward model with random weights, loaded as a group in this process and served at a port, to measure serving.

Invariant: the service is the app that ``rlhf-ray serve`` puts behind its port, over the same worker; only Ray is left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.actors.ranks import InProcessRanks
from rlhf_ray.actors.workers.reward import RewardSetup, RewardWorker
from rlhf_ray.config.jobs.serve import ServeConfig
from rlhf_ray.config.sections.engine import ResourcesConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.roles import ScoringRole
from rlhf_ray.config.sections.run import RunConfig
from rlhf_ray.models import make_model, save_pretrained
from rlhf_ray.models.regression_loading import make_head, wrap_backbone
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult
from rlhf_ray.serving.app import create_app
from rlhf_ray.serving.backend import GroupBackend
from rlhf_ray.serving.metrics import Metrics
from rlhf_ray.serving.models import Backend, Limits, ModelCatalog, ServedModel
from rlhf_ray.serving.server import WebServer

VOCABULARY = 4096


def save_policy(directory: Path, shape: str) -> Path:
    """Write a policy with a tokenizer of single bytes, which nothing uses: sequences are given as token ids."""
    save_pretrained(make_model(shape, VOCABULARY, seed=0, pad_token_id=0), _tokenizer(), directory, metadata={})
    return directory


def _tokenizer() -> PreTrainedTokenizerFast:
    letters = {letter: number for number, letter in enumerate(("<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())))}
    inner = Tokenizer(models.BPE(letters, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>")


def save_model(directory: Path, shape: str) -> Path:
    """Write a reward model with the same tokenizer."""
    backbone = make_model(shape, VOCABULARY, seed=0, pad_token_id=0)
    head = make_head(backbone.base_model, "inv_sqrt", 0)
    model = wrap_backbone(
        backbone.base_model, head, "reward", attention="auto", strict_attention=False, head_origin="fresh"
    )
    save_pretrained(model, _tokenizer(), directory, metadata={})
    return directory


def role_of(directory: Path, *, threads: int) -> ScoringRole:
    """The config of the model as a role, in bf16."""
    resources = ResourcesConfig(threads_per_rank=threads)
    return ScoringRole(model=ModelConfig(path=str(directory), dtype="bf16"), resources=resources)


def load_group(role: ScoringRole, *, max_batch_tokens: int) -> RewardGroup:
    """Load the model as a group of one rank in this process."""
    group = RewardGroup(InProcessRanks("reward", RewardWorker()))
    group.setup(RewardSetup(role, seed=0, max_tokens=max_batch_tokens), timeout_s=600.0).result()
    return group


class Instant:
    """A model that takes no time, so that only the transport is measured."""

    restarts = False

    async def score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        return [ScoreResult.of(0.5, len(request.token_ids or ())) for request in requests]

    def describe(self) -> Mapping[str, Any]:
        return {"model": "instant"}

    async def restart(self) -> None:
        raise AssertionError("it does not fail")

    async def close(self) -> None:
        """It holds nothing."""


def instant_app() -> Starlette:
    """The app without a model."""
    config = ServeConfig(kind="serve", run=RunConfig(name="load"), reward=ScoringRole(model=ModelConfig(path="none")))
    return _app(config, Instant(), Metrics())[0]


def _app(config: ServeConfig, backend: Backend, metrics: Metrics) -> tuple[Starlette, ModelCatalog]:
    models = ModelCatalog([ServedModel(config.name, [backend], Limits.of(config), metrics)])
    return create_app(models, config, metrics), models


class Service:
    """A running service: its address and its metrics."""

    def __init__(self, server: WebServer, metrics: Metrics, models: ModelCatalog) -> None:
        self.host, port = server.address.removeprefix("http://").rsplit(":", 1)
        self.port = int(port)
        self.metrics, self.models = metrics, models


@contextmanager
def serving(
    role: ScoringRole,
    backend: Callable[[ServeConfig], Backend] | RewardGroup,
    metrics: Metrics | None = None,
    **settings: Any,
) -> Iterator[Service]:
    """Serve the app at a free port of this machine; ``metrics`` are its own unless given."""
    config = ServeConfig(kind="serve", run=RunConfig(name="load"), reward=role, port=0, **settings)
    if isinstance(backend, RewardGroup):
        scoring: Backend = GroupBackend(backend, role.model, normalize=False)
    else:
        scoring = backend(config)
    metrics = Metrics() if metrics is None else metrics
    app, models = _app(config, scoring, metrics)
    server = WebServer(config.host, config.port)
    server.start(app)
    try:
        yield Service(server, metrics, models)
    finally:
        server.stop()


def bodies(sequences: Sequence[Sequence[int]], items: int) -> list[str]:
    """Request bodies for ``/v1/reward`` with ``items`` items each."""
    rows = [{"token_ids": list(sequence)} for sequence in sequences]
    return [json.dumps({"items": rows[start : start + items]}) for start in range(0, len(rows), items)]
