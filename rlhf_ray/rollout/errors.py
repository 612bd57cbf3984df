"""How a rollout engine or the fleet of them fails.

Always true: after one of these the engine serves nothing until it was restarted and got whole weights again.
"""

from __future__ import annotations

from rlhf_ray.errors import GroupError, RlhfRayError


class EngineDeadError(GroupError):
    """The engine failed, now or before, and refuses to work."""


class WeightUpdateError(GroupError):
    """A weight update failed half way: the engine holds a mixture of weights, so it is dead, not stale."""


class WireError(RlhfRayError):
    """Weights on the wire are not the weights that were announced."""


class ForbiddenTransitionError(RlhfRayError):
    """An event that the state of a rollout engine does not allow."""
