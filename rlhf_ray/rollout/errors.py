"""The errors of rollout engines, of their weight updates and of the fleet.

Invariant: an engine that raised :class:`EngineDeadError` or :class:`WeightUpdateError` generates nothing until it has been
restarted and has received all weights again.
"""

from __future__ import annotations

import math

from rlhf_ray.errors import DeadlineError, GroupError, RlhfRayError


class EngineDeadError(GroupError):
    """The engine failed, now or before, and refuses to work."""


class WeightUpdateError(GroupError):
    """A weight update failed part-way. The engine holds a mixture of weights, so it is dead, not stale."""


class TooSlowError(DeadlineError):
    """The engine works, but needs longer for its requests than it was given: the same again takes as long again."""


def explain_too_slow(dropped: int, requests: int, deadline_s: float, sampled: int, most: int) -> str:
    """Why ``dropped`` of the requests were unfinished: about ``sampled`` tokens of ``most`` at the longest were sampled."""
    text = f"{dropped} of {requests} requests were unfinished after {deadline_s:g} s (rollout.timeout_s) and were dropped: "
    if not sampled:
        return f"{text}not one token was sampled in that time. Raise rollout.timeout_s"
    rate = sampled / deadline_s
    return (
        f"{text}about {rate:.1f} tokens/s were sampled, so that answers of full length need about {math.ceil(most / rate)} s. "
        "Raise rollout.timeout_s to that, lower rollout.max_new_tokens, or add engines (rollout.engines)"
    )


class WireError(RlhfRayError):
    """Weights on the wire are not the weights that were announced."""


class ForbiddenTransitionError(RlhfRayError):
    """An event that the state of a rollout engine does not allow."""
