"""Methods of actors that take the context of their call, and have their answer recorded as a span.

Invariant: a call without a context does what the method alone would do.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from rlhf_ray.processes import spans


def _recorded(method: Callable[..., Any]) -> Callable[..., Any]:
    """``method``, which takes the context of its call too. Ray (2.60) looks behind what is wrapped, so it is not marked so."""

    @functools.wraps(method)
    def run(self: Any, *arguments: Any, _context: spans.Context | None = None, **named: Any) -> Any:
        if _context is None:
            return method(self, *arguments, **named)
        with spans.answering(_context, self.rank, method.__name__):
            return method(self, *arguments, **named)

    del run.__wrapped__
    signature = inspect.signature(method)
    own = inspect.Parameter(spans.CONTEXT, inspect.Parameter.KEYWORD_ONLY, default=None)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), own])  # type: ignore[attr-defined]
    return run


def record_calls(actor: type) -> None:
    """Have the answers to calls that carry a context recorded, in every public method of an actor's class."""
    for name, method in inspect.getmembers(actor, inspect.isfunction):
        if not name.startswith("_"):
            setattr(actor, name, _recorded(method))
