"""Imported by every Python of a run whose PYTHONPATH begins with this folder: makes one method of one process hang.

``RLHF_RAY_TEST_HANG`` is MODULE:CLASS.METHOD:FILE. The first call after FILE exists, of whatever process, sleeps for ever; the
process id is in FILE then. Which rank it is, FILE may say: only one whose ``rank`` is the number in it.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import time
from pathlib import Path
from typing import Any

VARIABLE = "RLHF_RAY_TEST_HANG"


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, module: str, change: Any) -> None:
        self.module, self.change = module, change

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.module:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                execute(module)
                self.change(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _install(module: str, method: str, file: Path) -> None:
    def change(loaded: Any) -> None:
        owner, name = method.split(".")
        original = getattr(getattr(loaded, owner), name)

        @functools.wraps(original)
        def hanging(self: Any, *arguments: Any, **options: Any) -> Any:
            if file.exists() and file.read_text() == str(getattr(self, "rank", 0)):
                file.write_text(f"process {os.getpid()}")
                time.sleep(100_000)
            return original(self, *arguments, **options)

        setattr(getattr(loaded, owner), name, hanging)

    sys.meta_path.insert(0, _Finder(module, change))


if VARIABLE in os.environ:
    _module, _method, _file = os.environ[VARIABLE].split(":")
    _install(_module, _method, Path(_file))
