"""The control groups of Linux that this process is in, whose limits hold for it.

Invariant: the group of the process itself comes first, and each one around it follows, up to the root that is visible here; a
container sees its own group as the root. A group whose files are not visible is a path at which nothing is.
"""

from __future__ import annotations

from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_CGROUP = Path("/proc/self/cgroup")


def groups(root: Path, own: Path) -> list[Path]:
    """The directories of the groups of version 2 (the line ``0::/path`` of ``own``) below ``root``."""
    return _around(root, next((line[3:] for line in read_lines(own) if line.startswith("0::")), ""))


def groups_of(controller: str, root: Path, own: Path) -> list[Path]:
    """Those of version 1 (the line ``4:memory:/path``) that limit one thing, such as ``memory``."""
    entries = (line.split(":", 2) for line in read_lines(own))
    paths = (entry[2] for entry in entries if len(entry) == 3 and controller in entry[1].split(","))
    return _around(root / controller, next(paths, ""))


def _around(root: Path, path: str) -> list[Path]:
    below = (root / path.strip("/")).resolve() if ".." not in path else root
    return [below, *(parent for parent in below.parents if parent.is_relative_to(root))]


def read_lines(path: Path) -> list[str]:
    """The lines of a file; none of one that cannot be read."""
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
