"""Heavy packages imported faster: the garbage collector rests meanwhile.

Always true: afterwards the collector runs as it did before, and no longer walks what was imported, which lives as long as
the process. Torch, transformers, DeepSpeed and vLLM make millions of such objects; while they are made the collector finds
nothing, and takes a quarter of the time.
"""

from __future__ import annotations

import atexit
import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

atexit.register(gc.unfreeze)  # or libraries that count what is left at the end complain of leaks


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import within this block."""
    ran = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if ran:
            gc.enable()


def import_object(path: str) -> Any:
    """What ``module:name`` names, its module imported."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
