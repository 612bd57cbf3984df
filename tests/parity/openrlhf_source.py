"""OpenRLHF's own source on a machine that lacks what its packages import at the top (deepspeed, flash-attn, ray).

For the oracles, which run in the environment of the independent implementations.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ABSENT = ("deepspeed",)


def module(name: str) -> ModuleType:
    """``openrlhf.<name>``, without running the ``__init__`` files of the packages around it."""
    import transformers  # noqa: F401  (looks for deepspeed when it is imported: before the stand-in is there)

    packages = Path(sys.prefix) / "openrlhf" / "openrlhf"
    if not packages.is_dir():
        raise SystemExit(f"{packages} is missing: remove .venv-parity, and make parity builds it anew")
    for absent in ABSENT:
        if absent not in sys.modules:
            sys.modules[absent] = ModuleType(absent)
            sys.modules[absent].__spec__ = ModuleSpec(absent, None)
    parts = ["openrlhf", *name.split(".")[:-1]]
    for depth in range(1, len(parts) + 1):
        package = ModuleType(".".join(parts[:depth]))
        package.__path__ = [str(packages.joinpath(*parts[1:depth]))]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"openrlhf.{name}")
