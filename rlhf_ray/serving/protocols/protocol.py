"""What a protocol is: a pure translation from a body to items, and from their results to an answer.

Invariants: a protocol sees neither the network nor the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_ray.serving.protocols.fields import Body
from rlhf_ray.serving.protocols.requests import ParsedRequest
from rlhf_ray.serving.refusals import Refusal, plain


@dataclass(frozen=True)
class Protocol:
    """One interface that callers know."""

    name: str
    paths: tuple[str, ...]
    summary: str
    bodies: tuple[type[Body], ...]
    """The forms that a body may have; the first one that claims a body reads it."""
    answer: Any
    """The type of its answers, from which their JSON schema is made."""
    refuse: Callable[[Refusal], Any] = plain
    """Makes the body of an answer without scores."""

    def read(self, values: Mapping[str, Any], *, max_items: int | None = None) -> ParsedRequest:
        """The items of a body; raises a :class:`Refusal` for a body that is not of the protocol's form, or has too many."""
        return next(form for form in self.bodies if form.claims(values)).read(values, max_items=max_items)
