"""Import heavy packages faster by pausing Python's garbage collector.

Torch, transformers, DeepSpeed and vLLM create millions of objects while they are imported. The collector would find no
garbage among them and take a quarter of the time.

Invariant: afterwards the collector is on or off as it was before, and no longer visits the imported objects, which live as
long as the process.
"""

from __future__ import annotations

import atexit
import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

atexit.register(gc.unfreeze)  # some libraries count objects at exit, and would report the frozen ones as leaks


@contextmanager
def quick_imports() -> Iterator[None]:
    """Pause the garbage collector for the imports in the ``with`` block."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


def import_object(path: str) -> Any:
    """What ``module:name`` names, its module imported."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)
