"""Export the public names of a package without importing its modules until a name is used.

Invariant: importing a package that uses this imports none of its modules, so that a command that needs no torch never
loads it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_exports(
    package: str, exports: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """The ``__getattr__``, ``__dir__`` and ``__all__`` of a package whose public names are defined in its modules.

    ``exports`` maps a public name to its module, relative to ``package``, such as ``{"Actor": ".actor"}``.
    """
    names = sorted(exports)

    def getattribute(name: str) -> Any:
        if name not in exports:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(exports[name], package), name)

    def directory() -> list[str]:
        return names

    return getattribute, directory, names
