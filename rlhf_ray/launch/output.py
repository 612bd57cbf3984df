"""Where a command writes what it finds.

Invariant: a place that cannot be written to is refused before the work begins.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_ray.errors import RequestError


def require_folder(option: str, output: Path | None) -> None:
    """Refuse a file whose folder does not exist; ``option`` is what named it."""
    if output is not None and not output.parent.is_dir():
        raise RequestError(
            f"{option} {output}: the folder {output.parent} does not exist: make it, or name another file"
        )
