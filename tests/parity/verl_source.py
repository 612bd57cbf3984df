"""verl's losses on a machine that lacks what its modules import at the top (tensordict, omegaconf, its own configuration).

For the oracle, which runs in the environment of the independent implementations.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any


def _unchanged(*_: Any) -> Callable[[Any], Any]:
    return lambda function: function


class AlgoConfig:
    """Its losses refuse a config of this class."""


NAMES: dict[str, dict[str, Any]] = {
    "tensordict": {"TensorDict": object},
    "omegaconf": {"DictConfig": object},
    "verl.utils.device": {"get_device_name": None, "get_torch_device": None},
    "verl.utils.import_utils": {"deprecated": _unchanged},
    "verl.trainer.config": {"AlgoConfig": AlgoConfig},
    "verl.workers.config": {"ActorConfig": object},
}
"""What is imported from modules that are not there, or that import what is not."""
PACKAGES: dict[str, dict[str, Any]] = {
    "verl": {}, "verl.trainer": {}, "verl.trainer.ppo": {}, "verl.utils": {"as_torch_index": None, "group_mean_std": None},
}  # fmt: skip


def core_algos() -> ModuleType:
    """``verl.trainer.ppo.core_algos``, without running the ``__init__`` files of its packages."""
    folder = Path(sys.prefix) / "verl"
    if not (folder / "verl").is_dir():
        raise SystemExit(f"{folder} is missing: remove .venv-parity, and make parity builds it anew")
    for name, content in {**PACKAGES, **NAMES}.items():
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(content)
        if name in PACKAGES:
            sys.modules[name].__path__ = [str(folder.joinpath(*name.split(".")))]
    return importlib.import_module("verl.trainer.ppo.core_algos")
