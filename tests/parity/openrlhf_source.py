"""OpenRLHF's own source on a machine that lacks what its packages import at the top (deepspeed, flash-attn, ray).

For the oracles, which run in the environment of the independent implementations.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

ABSENT = ("deepspeed", "deepspeed.utils", "flash_attn", "flash_attn.bert_padding", "flash_attn.utils",
          "flash_attn.utils.distributed")  # fmt: skip


class StandIn(ModuleType):
    """Has every name that is imported from it; none is called."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


def module(name: str) -> ModuleType:
    """``openrlhf.<name>``, without running the ``__init__`` files of its packages."""
    import peft  # noqa: F401  (looks for deepspeed when it is imported, as transformers: before the stand-in is there)
    import transformers.integrations.deepspeed  # noqa: F401

    packages = Path(sys.prefix) / "openrlhf" / "openrlhf"
    if not packages.is_dir():
        raise SystemExit(f"{packages} is missing: remove .venv-parity, and make parity builds it anew")
    for absent in ABSENT:
        if absent not in sys.modules:
            sys.modules[absent] = StandIn(absent)
            sys.modules[absent].__spec__ = ModuleSpec(absent, None)
    for init in packages.rglob("__init__.py"):
        folder = init.parent
        package = ModuleType(".".join(["openrlhf", *folder.relative_to(packages).parts]))
        package.__path__ = [str(folder)]
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(f"openrlhf.{name}")
