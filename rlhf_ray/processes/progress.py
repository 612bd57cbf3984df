"""When this process last got ahead with something that it waits for: the answer of a rank, of a function, of a service.

Invariant: only what came from outside counts, so that a thread that runs in a circle shows no progress.
"""

from __future__ import annotations

import time

_made_at = time.monotonic()


def made() -> None:
    """Note that something came."""
    global _made_at
    _made_at = time.monotonic()


def made_at() -> float:
    """When something last came, in seconds of ``time.monotonic``."""
    return _made_at
