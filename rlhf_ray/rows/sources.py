"""Where rows come from: one data file, a folder of a data set, or a data set of a hub.

Invariants: rows come one by one, in the order of the file or the split, each with its place; what cannot be reached or read
is one :class:`DataError` that names the source, what was tried and the way out; a hub is asked only for a name that is not a
path on this machine, and only where the process may ask it (:func:`rlhf_ray.environment.for_process`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from rlhf_ray.environment import is_hub_id
from rlhf_ray.errors import DataError
from rlhf_ray.rows.formats import PlacedRows, raw_rows


@dataclass(frozen=True)
class RowSource:
    """A data file, or a data set with the part of it that is meant."""

    path: str
    """A file, a folder, or ``org/name`` on a hub."""
    split: str | None = None
    """Which split of a data set, also as a slice such as ``train[:1000]``; none: its only one, or else ``train``."""
    config: str | None = None
    """Which configuration (subset) of a data set; none where it has only one."""

    def __str__(self) -> str:
        """As messages name it."""
        parts = ", ".join(part for part in (self.config, self.split) if part)
        return f"{self.path} ({parts})" if parts else self.path

    @property
    def is_file(self) -> bool:
        """Whether it is one file, which has lines or rows and no splits."""
        return Path(self.path).is_file()

    @property
    def is_on_hub(self) -> bool:
        """Whether only a hub can have it; ``folder/name`` is a path where ``folder`` stands on this machine."""
        return is_hub_id(self.path)


AnySource = RowSource | Path | str


def as_source(source: AnySource) -> RowSource:
    """A path as a source."""
    return source if isinstance(source, RowSource) else RowSource(str(source))


def placed_rows(source: RowSource) -> PlacedRows:
    """The content of each row, after its place: ``file:line``, or ``source: row n`` where there are no lines."""
    if source.is_file:
        if source.split is not None or source.config is not None:
            raise DataError(
                f"{source.path}: one file has neither splits nor configurations: remove "
                f"{' and '.join(name for name in ('split', 'config') if getattr(source, name) is not None)}, or name the "
                "folder of a data set"
            )
        yield from raw_rows(Path(source.path))
        return
    yield from ((f"{source}: row {number}", row) for number, row in enumerate(_set_rows(source), 1))


def every_split(source: RowSource) -> list[RowSource]:
    """The source itself, or each of its splits where it is a data set and none is named."""
    if source.is_file or source.split is not None or not (source.is_on_hub or Path(source.path).is_dir()):
        return [source]
    from rlhf_ray.rows.data_sets import split_names

    return [replace(source, split=name) for name in split_names(source.path, source.config)] or [source]


def content_files(source: RowSource) -> list[Path]:
    """The files that hold the rows of a source: those of the file or folder, or what was downloaded from a hub."""
    if not source.is_on_hub:
        return [Path(source.path)]
    from rlhf_ray.rows.data_sets import downloaded_files

    return downloaded_files(source.path, source.config, source.split)


def _set_rows(source: RowSource) -> Iterator[object]:
    if not source.is_on_hub and not Path(source.path).is_dir():
        raise DataError(f"{source.path}: no such file or folder: name a data file, such as pairs.jsonl.gz")
    from rlhf_ray.rows.data_sets import data_set_rows

    return data_set_rows(source.path, source.config, source.split, on_hub=source.is_on_hub)
