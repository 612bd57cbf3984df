"""The errors of rollout engines, of their weight updates and of the fleet.

Invariant: an engine that raised :class:`EngineDeadError` or :class:`WeightUpdateError` generates nothing until it has been
restarted and has received all weights again.
"""

from __future__ import annotations

from rlhf_ray.errors import DeadlineError, GroupError, RlhfRayError


class EngineDeadError(GroupError):
    """The engine failed, now or before, and refuses to work."""


class WeightUpdateError(GroupError):
    """A weight update failed part-way. The engine holds a mixture of weights, so it is dead, not stale."""


class TooSlowError(DeadlineError):
    """The engine works, but needs longer for its requests than it was given: the same again takes as long again."""


class WireError(RlhfRayError):
    """Weights on the wire are not the weights that were announced."""


class ForbiddenTransitionError(RlhfRayError):
    """An event that the state of a rollout engine does not allow."""
