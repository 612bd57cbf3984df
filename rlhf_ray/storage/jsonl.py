"""Append-only files with one JSON object on each line.

Invariants: a line counts once its newline is on disk. An unfinished line at the end, which a crash leaves, is ignored by
readers and removed by the next append. A damaged line before the end, or one that is not what the file is for, is an
``IntegrityError`` that names it. What is remembered of a file reads as the file does, unless an edit left its last
``COMPARED_BYTES`` as they were.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from rlhf_ray.errors import IntegrityError, StorageError
from rlhf_ray.storage.atomic import sync_directory, write_file
from rlhf_ray.storage.failures import storage_errors
from rlhf_ray.storage.locks import take_within
from rlhf_ray.storage.reading import not_a_file, read_bytes

Line = dict[str, Any]
LOCKED_S = 60.0
"""How long another process may take to add its lines to a file that is shared."""


COMPARED_BYTES = 4096
"""Of a file that is read on, so many bytes before the place must be what they were."""


@dataclass(frozen=True)
class _Known:
    """What was read of a file: whole lines, their number, and where and with which bytes the last one ended."""

    lines: list[Line] = field(default_factory=list)
    number: int = 0
    offset: int = 0
    end: bytes = b""


class JsonLines:
    """One file of JSON lines, with one writer and any number of readers.

    ``check`` says what is wrong with a line that was read, and nothing (an empty text) if it is as it must be. A file that
    ``is_shared`` has several writers: each locks it while it adds lines, so that none takes the line of another for a torn one.
    """

    def __init__(
        self, path: str | Path, check: Callable[[Line], str] = lambda line: "", *, is_shared: bool = False
    ) -> None:
        self.path = Path(path)
        self._check = check
        self._is_shared = is_shared
        self._known: _Known | None = None

    def remember(self) -> None:
        """From now on parse each line once, and keep it in memory, for one who reads the file again and again.

        A file that was replaced, cut or edited in its last ``COMPARED_BYTES`` is read anew.
        """
        self._known = self._known or _Known()

    def append(self, line: Mapping[str, Any]) -> None:
        """Add one line and wait until it is on disk."""
        self.extend([line])

    def extend(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add lines and wait until they are on disk."""
        text = b"".join(map(_render, lines))
        with storage_errors(self.path):
            is_new = not self.path.exists()
            if not is_new and not self.path.is_file():
                raise not_a_file(self.path)
            with open(self.path, "ab+") as stream:
                if self._is_shared and not take_within(stream.fileno(), LOCKED_S):
                    raise StorageError(
                        f"another process has locked {self.path} for {LOCKED_S:g} s: end that one, or name another file"
                    )
                _cut_torn_end(stream)
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            if is_new:
                sync_directory(self.path.parent)

    def read(self) -> list[Line]:
        """All complete lines; none if the file does not exist."""
        if not self.path.exists():
            return []
        if self._known is not None:
            self._known = self._read_on(self._known)
            return list(self._known.lines)
        whole, _, _torn = read_bytes(self.path).rpartition(b"\n")
        return [self._parse(raw, number) for number, raw in enumerate(whole.split(b"\n"), 1) if raw]

    def _read_on(self, known: _Known) -> _Known:
        """What is known, with the lines that were added since."""
        raw = read_bytes(self.path, known.offset - len(known.end))
        if not raw.startswith(known.end):
            known, raw = _Known(), read_bytes(self.path)
        whole, newline, _torn = raw[len(known.end) :].rpartition(b"\n")
        if not newline:
            return known
        added = [(number, line) for number, line in enumerate(whole.split(b"\n"), known.number + 1) if line]
        return _Known(
            lines=[*known.lines, *(self._parse(line, number) for number, line in added)],
            number=known.number + whole.count(b"\n") + 1,
            offset=known.offset + len(whole) + 1,
            end=(known.end + whole + newline)[-COMPARED_BYTES:],
        )

    def amend_last(self, values: Mapping[str, Any]) -> None:
        """Add ``values`` to the last line, which is there."""
        lines = self.read()
        write_file(self.path, b"".join(map(_render, [*lines[:-1], {**lines[-1], **values}])))

    def keep(self, is_valid: Callable[[Line], bool], void: JsonLines) -> int:
        """Keep the valid lines and move the others to the end of ``void``; returns how many moved.

        After a crash in between, a line may be in both files, but never in neither.
        """
        lines = self.read()
        rejected = [line for line in lines if not is_valid(line)]
        if rejected:
            void.extend(rejected)
            write_file(self.path, b"".join(_render(line) for line in lines if is_valid(line)))
        return len(rejected)

    def _parse(self, raw: bytes, number: int) -> Line:
        try:
            line = json.loads(raw, parse_constant=_refuse)
            problem = self._check(line) if isinstance(line, dict) else f"{type(line).__name__}, not an object"
        except (ValueError, RecursionError) as error:
            problem = "nested too deep" if isinstance(error, RecursionError) else str(error).partition(";")[0]
        if problem:
            raise IntegrityError(f"{self.path}:{number} is damaged ({problem}): remove the line to continue")
        return cast(Line, line)


def as_json(value: Any) -> Any:
    """A value as it comes back from a line; None where no line can hold it."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    """NaN and Infinity, which Python would read although JSON has no such numbers."""
    raise ValueError(f"{constant} is no number in JSON")


def _render(line: Mapping[str, Any]) -> bytes:
    return (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _cut_torn_end(stream: Any) -> None:
    end = stream.seek(0, os.SEEK_END)
    if end == 0:
        return
    stream.seek(end - 1)
    if stream.read(1) != b"\n":
        stream.seek(0)  # read() below starts at the beginning
        stream.truncate(stream.read().rfind(b"\n") + 1)
