"""The policy objective and the advantage estimator of a user's own: made from their names, and checked when they are called.

Invariants:

- An objective travels to a rank as its name and its parameters, and the rank loads it itself: the module of a user's file
  cannot be imported there by name, so the object could not be pickled.
- Whatever a part returns is checked for its type, its shape and its dtype at every call; at the first call also for NaN and
  Inf where its inputs had none. Later such numbers are left to the vote, which skips the update.
- Advantages and returns are 0 at every token that is not an action, whatever the estimator put there.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf_ray.algorithms.advantages import Estimator
from rlhf_ray.algorithms.policy_loss import Objective
from rlhf_ray.errors import RequestError
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.user_code import ADVANTAGES, OBJECTIVES, accepts, construct, load_object

OBJECTIVE_KEY = "algorithm.objective"
ADVANTAGES_KEY = "algorithm.advantages"


class UserObjective:
    """A policy objective of a user's own, as a value that can be sent to another process."""

    def __init__(self, name: str, parameters: Mapping[str, Any]) -> None:
        self.name = name
        self.parameters = dict(parameters)

    def __call__(
        self, log_probs: Float[Tensor, "N"], log_ratio: Float[Tensor, "N"], advantages: Float[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N"], Bool[Tensor, "N"]]:
        """What the user's objective gives, checked."""
        return load_objective(self.name, json.dumps(self.parameters, sort_keys=True))(log_probs, log_ratio, advantages)


@cache  # one per process: the loss is sent anew for every update
def load_objective(name: str, parameters: str) -> Objective:
    """Load the objective ``name`` in this process and make it with the parameters in this JSON text."""
    factory = load_object(OBJECTIVE_KEY, name, group=OBJECTIVES, kind="class")
    objective = construct(OBJECTIVE_KEY, name, factory, json.loads(parameters))
    if not callable(objective) or not accepts(objective, "log_probs", "log_ratio", "advantages"):
        raise RequestError(
            f"{OBJECTIVE_KEY} {name!r}: it makes {_kind(objective)}, which cannot be called with (log_probs, log_ratio, "
            "advantages): give it a method __call__(self, log_probs, log_ratio, advantages)"
        )
    return _CheckedObjective(name, objective)


class _CheckedObjective:
    """An objective whose results are checked."""

    def __init__(self, name: str, objective: Objective) -> None:
        self.name = name
        self.objective = objective
        self.called = False

    def __call__(
        self, log_probs: Float[Tensor, "N"], log_ratio: Float[Tensor, "N"], advantages: Float[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N"], Bool[Tensor, "N"]]:
        wanted = f"two tensors of shape {tuple(advantages.shape)}: what is maximised (floats), and where it is clipped (bools)"
        returned = self.objective(log_probs, log_ratio, advantages)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise RequestError(f"{OBJECTIVE_KEY} {self.name!r}: it returned {_kind(returned)}, not {wanted}")
        value, clipped = returned
        if not _is_like(value, advantages) or not _has_shape(clipped, advantages) or clipped.dtype != torch.bool:
            kinds = f"{_kind(value)} and {_kind(clipped)}"
            raise RequestError(f"{OBJECTIVE_KEY} {self.name!r}: it returned {kinds}, not {wanted}")
        if not self.called and _finite(log_probs, log_ratio, advantages) and not _finite(value):
            raise RequestError(
                f"{OBJECTIVE_KEY} {self.name!r}: it returned NaN or Inf where log_probs, log_ratio and advantages are finite; "
                "at tokens that are not actions all three are 0"
            )
        if not self.called and log_probs.requires_grad and not value.requires_grad:
            raise RequestError(
                f"{OBJECTIVE_KEY} {self.name!r}: what it maximises has no gradient, so nothing would be learned: compute "
                "it from log_probs or log_ratio without detach() or no_grad()"
            )
        self.called = True
        return value, clipped


class UserEstimator:
    """An advantage estimator of a user's own, whose results are checked."""

    def __init__(self, name: str, estimator: Estimator, *, has_critic: bool) -> None:
        self.name = name
        self.estimator = estimator
        self.has_critic = has_critic
        self.called = False

    @property
    def needs(self) -> tuple[str, ...]:
        """The columns that it reads."""
        return self.estimator.needs

    def __call__(
        self, batch: TrajectoryBatch, token_rewards: Float[Tensor, "N"]
    ) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"] | None]:
        """The user's advantages and returns, checked, with 0 at tokens that are not actions."""
        shape = tuple(token_rewards.shape)
        returned = self.estimator(batch, token_rewards)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise self._refusal(
                f"it returned {_kind(returned)}, not a pair: advantages {shape}, and returns {shape} or None"
            )
        advantages, returns = returned
        if not _is_like(advantages, token_rewards):
            raise self._refusal(f"its advantages are {_kind(advantages)}, not a float tensor of shape {shape}")
        if self.has_critic and returns is None:
            raise self._refusal("it returned no returns, but there is a critic, which learns them: return them too")
        if returns is not None and not _is_like(returns, token_rewards):
            raise self._refusal(f"its returns are {_kind(returns)}, not a float tensor of shape {shape}, or None")
        mask = batch["action_mask"]
        if not self.called:
            self._refuse_new_nan(batch, token_rewards, advantages[mask], () if returns is None else returns[mask])
        self.called = True
        zero = torch.zeros((), dtype=token_rewards.dtype)
        kept = None if returns is None else torch.where(mask, returns.to(token_rewards.dtype), zero)
        return torch.where(mask, advantages.to(token_rewards.dtype), zero), kept if self.has_critic else None

    def _refuse_new_nan(self, batch: TrajectoryBatch, token_rewards: Tensor, advantages: Tensor, returns: Any) -> None:
        mask = batch["action_mask"]
        read = [batch[name] for name in self.needs if batch[name].is_floating_point()]
        inputs = [column[mask] if len(column) == len(mask) else column for column in (token_rewards, *read)]
        if _finite(*inputs) and not (_finite(advantages) and (len(returns) == 0 or _finite(returns))):
            raise self._refusal(
                "it returned NaN or Inf at an action, although the token rewards and what it reads are finite"
            )

    def _refusal(self, text: str) -> RequestError:
        return RequestError(f"{ADVANTAGES_KEY} {self.name!r}: {text}")


def make_user_objective(name: str, parameters: Mapping[str, Any]) -> UserObjective:
    """Make the objective that ``name`` names; refuses one that cannot be made or called."""
    objective = UserObjective(name, parameters)
    load_objective.cache_clear()  # the file may have changed since another run in this process
    load_objective(name, json.dumps(objective.parameters, sort_keys=True))
    return objective


def make_user_estimator(
    name: str, parameters: Mapping[str, Any], *, columns: Collection[str], has_critic: bool
) -> UserEstimator:
    """Make the estimator that ``name`` names; refuses one that does not keep the protocol, or needs other ``columns``."""
    factory = load_object(ADVANTAGES_KEY, name, group=ADVANTAGES, kind="class")
    estimator = construct(ADVANTAGES_KEY, name, factory, parameters)
    problem = _protocol_problem(estimator) or _column_problem(estimator.needs, columns, has_critic)
    if problem is not None:
        raise RequestError(f"{ADVANTAGES_KEY} {name!r}: {problem}")
    return UserEstimator(name, estimator, has_critic=has_critic)


def _protocol_problem(estimator: Any) -> str | None:
    if not isinstance(estimator, Estimator) or not accepts(estimator, "batch", "token_rewards"):
        return (
            f"it makes {_kind(estimator)}, which is not an estimator: give it an attribute needs (the names of the "
            "columns that it reads) and a method __call__(self, batch, token_rewards)"
        )
    if not isinstance(estimator.needs, tuple) or not all(isinstance(column, str) for column in estimator.needs):
        return f"its needs are {estimator.needs!r}, not a tuple of names of columns"
    return None


def _column_problem(needs: tuple[str, ...], columns: Collection[str], has_critic: bool) -> str | None:
    if has_critic and "values" not in needs:
        return "it does not read the column values, so a critic is of no use: remove the critic section (critic=null)"
    if not has_critic and "values" in needs:
        return "it reads the column values, which a critic gives: add a critic section"
    missing = [column for column in needs if column not in columns]
    if missing:
        return f"it reads {', '.join(missing)}, but the columns of a batch are {', '.join(sorted(columns))}"
    return None


def _is_like(value: Any, pattern: Tensor) -> bool:
    return _has_shape(value, pattern) and value.is_floating_point()


def _has_shape(value: Any, pattern: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == pattern.shape


def _finite(*tensors: Tensor) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of {str(value.dtype).removeprefix('torch.')} with shape {tuple(value.shape)}"
    return f"{type(value).__name__} {value!r}"[:120]
