"""Packs without shared prefixes, for figures that say what sharing gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

from rlhf_ray.actors import workers
from rlhf_ray.trajectories import pack


@contextmanager
def nothing_shared() -> Iterator[None]:
    """Within it, the workers of this process pack every sequence whole."""
    with patch.object(workers, "pack", partial(pack, share_prefixes=False)):
        yield
