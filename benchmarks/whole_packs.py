"""Turn shared prefixes off, to measure what they gain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

from rlhf_ray.actors.workers import model
from rlhf_ray.trajectories import pack


@contextmanager
def nothing_shared() -> Iterator[None]:
    """In the ``with`` block, the workers of this process pack every sequence whole."""
    with patch.object(model, "pack", partial(pack, share_prefixes=False)):
        yield
