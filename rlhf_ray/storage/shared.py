"""Whether another node sees the same directory.

Invariant: a directory of the same name on another disk is told apart, even if it holds files of the same names.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

SECONDS_TO_APPEAR = 3.0
"""How long a network file system may take to show on one node what was written on another."""


@dataclass(frozen=True)
class SharedFile:
    """A file that only grows, and what it began with on the node that wrote it, which no other file begins with."""

    path: str
    beginning: str

    @classmethod
    def at(cls, path: Path) -> SharedFile:
        """The file at ``path`` as it is now."""
        return cls(str(path.absolute()), path.read_text())

    def is_seen(self, within_s: float = SECONDS_TO_APPEAR) -> bool:
        """Whether this node sees it too."""
        deadline = time.monotonic() + within_s
        while not self._is_there():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def _is_there(self) -> bool:
        try:
            return Path(self.path).read_text().startswith(self.beginning)
        except (OSError, UnicodeDecodeError):
            return False
