"""A reward group as one replica of a served model.

Invariants: forwards wait in a thread, never in the event loop; a restart has a thread of its own, so that calls to groups that
hang never hold it up; one that fails leaves the backend as it was, to be tried again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.errors import GroupError, RequestError, RlhfRayError
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult

if TYPE_CHECKING:
    from rlhf_ray.actors.groups import RewardGroup

CALLS_AT_ONCE = 4
"""Of one replica: a batch, and batches of groups before it that hang until they are stopped."""


class GroupBackend:
    """One replica: a reward group, and how another group takes its place.

    ``start_again`` stops a group that failed and returns another one, ready; without it a failed group stays failed.
    """

    def __init__(
        self,
        group: RewardGroup,
        model: ModelConfig,
        *,
        normalize: bool,
        start_again: Callable[[RewardGroup], RewardGroup] | None = None,
        stop: Callable[[RewardGroup], None] | None = None,
    ) -> None:
        name, description = model_name(model), group.describe().result()
        self._description = {"model": name, "revision": model.revision, "dtype": model.dtype, **description}
        mean, std = description["mean"], description["std"]
        if normalize and mean is None:
            raise RequestError(
                f"normalize is asked for, but the config.json of {name} holds no mean with a std above 0: train the "
                "reward model with this project, write them there, or leave it off"
            )
        statistics: tuple[float, float] = (0.0, 1.0) if mean is None else (mean, std)
        self._mean, self._std = statistics
        self.group = group
        self._start_again, self._stop = start_again, stop
        self.restarts = start_again is not None
        self._calls = ThreadPoolExecutor(CALLS_AT_ONCE, "reward group call")
        self._restart = ThreadPoolExecutor(1, "reward group restart")

    async def score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        """One result per request, in order; raises :class:`GroupError`, also for an error that nobody foresaw."""
        group = self.group
        scoring = asyncio.get_running_loop().run_in_executor(self._calls, lambda: group.score(requests).result())
        try:
            results = await scoring
        except RlhfRayError:
            raise
        except Exception as error:  # its message may hold a text
            raise GroupError(group.role, None, "score", type(error).__name__) from error
        return [result.normalised(self._mean, self._std) for result in results]

    def describe(self) -> Mapping[str, Any]:
        """The model: its name and revision, tokenizer fingerprint, normalisation, longest item in tokens."""
        return self._description

    async def restart(self) -> None:
        """Put another group in the place of the one that failed."""
        if self._start_again is None:
            raise GroupError("reward", None, "restart", "the run that owns it does not restart it")
        await asyncio.get_running_loop().run_in_executor(self._restart, self._replace_group, self._start_again)

    def _replace_group(self, start_again: Callable[[RewardGroup], RewardGroup]) -> None:
        self.group = start_again(self.group)

    async def close(self) -> None:
        """Stop the group, after a restart that is under way: the group that it starts would outlive the backend."""
        await asyncio.to_thread(self._restart.shutdown)
        if self._stop is not None:
            await asyncio.to_thread(self._stop, self.group)
        self._calls.shutdown(wait=False)


def model_name(model: ModelConfig) -> str:
    """The path or hub id of a model, or for one that was made its shape."""
    return model.path or f"made:{model.make.shape if model.make else ''}"


def with_weights_of(model: ModelConfig, path: str, revision: str | None) -> ModelConfig:
    """The model at ``path``, held in memory and computed with exactly as ``model`` is."""
    return model.model_copy(update={"path": path, "revision": revision, "make": None})
