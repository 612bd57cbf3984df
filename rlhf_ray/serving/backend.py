"""A reward group as what scores behind the app.

Always true: forwards wait in a thread, never in the event loop; a restart that several ask for is one; a failed restart
leaves the backend as it was, to be tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.errors import GroupError, RequestError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult

if TYPE_CHECKING:
    from rlhf_ray.actors.groups import RewardGroup


class GroupBackend:
    """One replica: a reward group, and how another one takes its place."""

    def __init__(
        self,
        group: RewardGroup,
        model: ModelConfig,
        *,
        normalize: bool,
        again: Callable[[RewardGroup], RewardGroup] | None = None,
        stop: Callable[[RewardGroup], None] | None = None,
    ) -> None:
        name, described = model_name(model), group.describe().result()
        self._description = {"model": name, "revision": model.revision, "dtype": model.dtype, **described}
        mean, std = described["mean"], described["std"]
        if normalize and mean is None:
            raise RequestError(
                f"normalize is asked for, but the config.json of {name} holds no mean with a std above 0: train the "
                "reward model with this project, write them there, or leave it off"
            )
        self._normalization = (0.0, 1.0) if mean is None else (mean, std)
        self.group = group
        self._again, self._stop = again, stop
        self._restarting: asyncio.Task[None] | None = None

    async def score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        """One result a request, in order."""
        group = self.group
        results = await asyncio.to_thread(lambda: group.score(requests).result())
        return [result.normalised(*self._normalization) for result in results]

    def describe(self) -> Mapping[str, Any]:
        """The model: its name and revision, tokenizer fingerprint, normalisation, longest item."""
        return self._description

    async def restart(self) -> None:
        """Put another group in the place of the one that failed."""
        if self._again is None:
            raise GroupError("reward", None, "restart", "it belongs to a job of its own, which restarts it")
        if self._restarting is None or self._restarting.done():
            self._restarting = asyncio.create_task(asyncio.to_thread(self._start_again))
        await asyncio.shield(self._restarting)

    def _start_again(self) -> None:
        assert self._again is not None, "asked for by restart, which looked"
        self.group = self._again(self.group)

    async def close(self) -> None:
        """Stop the group."""
        if self._stop is not None:
            stop, group = self._stop, self.group
            await asyncio.to_thread(lambda: stop(group))


def model_name(model: ModelConfig) -> str:
    """The path or hub id of a model, or the shape that was made."""
    return model.path or f"made:{model.make.shape if model.make else ''}"


def with_weights_of(model: ModelConfig, path: str, revision: str | None) -> ModelConfig:
    """The model at ``path``, held in memory and computed with exactly as ``model`` is."""
    return model.model_copy(update={"path": path, "revision": revision, "make": None})
