"""Committed files of what independent implementations computed, and from which inputs.

Always true: what is read is bit for bit what was written; a comparison fails on a missing, added or non-finite value.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

Values = Mapping[str, np.ndarray]
"""Results by name."""

DIRECTORY = Path(__file__).parent / "expected"
TOLERANCE = 1e-5
"""The bar on the absolute difference of every value."""
FEW = 40
"""Arrays of up to so many elements are written as numbers that a reader can compare."""


@dataclass(frozen=True)
class Expected:
    """One committed file."""

    inputs: dict[str, Any]
    values: dict[str, np.ndarray]
    versions: dict[str, str]
    """Of the packages that computed ``values``."""

    @classmethod
    def read(cls, name: str) -> Expected:
        """The file of the comparison ``name``."""
        content = json.loads((DIRECTORY / f"{name}.json").read_text(), object_hook=_decode)
        return cls(content["inputs"], content["values"], content["versions"])

    def write(self, name: str) -> Path:
        """Replace the file of the comparison ``name``."""
        path = DIRECTORY / f"{name}.json"
        content = {"versions": self.versions, "inputs": self.inputs, "values": self.values}
        text = json.dumps(content, indent=1, default=_encode, allow_nan=False)
        lists = re.compile(r"\[[^][{}\"]*]")
        path.write_text(lists.sub(lambda found: re.sub(r"\s+", " ", found[0]), text) + "\n")
        return path


def differences(ours: Values, theirs: Values) -> dict[str, float]:
    """The largest absolute difference in each value; infinite where one side lacks it, has another shape, or NaN or Inf."""
    return {name: _largest(ours.get(name), theirs.get(name)) for name in sorted({*ours, *theirs})}


def _largest(one: np.ndarray | None, other: np.ndarray | None) -> float:
    if one is None or other is None or one.shape != other.shape or one.size == 0:
        return float("inf")
    difference = float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max())
    return difference if np.isfinite(difference) else float("inf")


def _encode(array: object) -> dict[str, Any]:
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        raise TypeError(f"only float32 arrays are kept, not {type(array).__name__} {getattr(array, 'dtype', '')}")
    if array.size <= FEW:
        return {"shape": array.shape, "numbers": array.flatten().tolist()}
    return {"shape": array.shape, "base64": base64.b64encode(array.astype("<f4").tobytes()).decode()}


def _decode(entry: dict[str, Any]) -> Any:
    if entry.keys() == {"shape", "numbers"}:
        return np.array(entry["numbers"], dtype=np.float32).reshape(entry["shape"])
    if entry.keys() == {"shape", "base64"}:
        flat = np.frombuffer(base64.b64decode(entry["base64"]), dtype="<f4")
        return flat.astype(np.float32).reshape(entry["shape"])
    return entry
