"""Ray's shells of the plain workers: the same methods, as actors.

Always true: an actor adds nothing to its worker but a name, a lane of its own for health checks, so that a rank inside a
collective still answers, and handles for results that stay in the object store.
"""

from __future__ import annotations

from typing import Any

import ray

from rlhf_ray.imports import quick_imports

with quick_imports():
    from rlhf_ray.actors.reward_worker import RewardWorker
    from rlhf_ray.actors.rollout_worker import RolloutWorker
    from rlhf_ray.actors.workers import CriticWorker, PolicyWorker, ReferenceWorker

HEALTH_LANE = "health"


class RankShell:
    """What Ray adds to a worker."""

    @ray.method(concurrency_group=HEALTH_LANE)
    def health(self) -> dict[str, Any]:
        return super().health()  # type: ignore[misc]

    def run_and_share(self, method: str, *arguments: Any) -> list[Any]:
        """Run ``method`` and keep its result in the object store; a list, so that the handle travels and not the value."""
        return [ray.put(getattr(self, method)(*arguments))]


class PolicyModelActor(RankShell, PolicyWorker):
    """One rank of the policy."""


class CriticModelActor(RankShell, CriticWorker):
    """One rank of the critic."""


class RewardModelActor(RankShell, RewardWorker):
    """One rank of the reward model, for PPO and as a scoring backend."""


class ReferenceModelActor(RankShell, ReferenceWorker):
    """One rank of the frozen reference policy."""


class RolloutActor(RankShell, RolloutWorker):
    """One rollout engine."""


ACTORS = {
    actor.role: actor
    for actor in (PolicyModelActor, CriticModelActor, RewardModelActor, ReferenceModelActor, RolloutActor)
}


def remote_class(role: str) -> Any:
    """The Ray actor class of a role."""
    return ray.remote(concurrency_groups={HEALTH_LANE: 1})(ACTORS[role])
