"""What a JSON document will take in memory, counted while its bytes arrive and before anything of it is built.

Invariants: the counts do not depend on where the document is cut into chunks; nothing inside a text counts but its bytes; of
what is no JSON the counts may be wrong, never larger than its bytes.
"""

from __future__ import annotations

BYTES_PER_VALUE, BYTES_PER_TEXT, BYTES_PER_CONTAINER = 16, 64, 200
"""About what Python takes for an element of a list, for a text besides its letters, and for a list or an object."""


class JsonSize:
    """Counts of the document up to now."""

    def __init__(self) -> None:
        self.bytes = 0
        self.containers = 0
        """Lists and objects."""
        self.values = 0
        """Commas: elements of lists and members of objects but the first of each."""
        self._quotes = 0
        self._half_escape = b""

    @property
    def texts(self) -> int:
        """Texts, keys included."""
        return (self._quotes + 1) // 2

    @property
    def memory(self) -> int:
        """About how many bytes the document takes once it is built."""
        return (
            self.bytes
            + BYTES_PER_VALUE * self.values
            + BYTES_PER_TEXT * self.texts
            + BYTES_PER_CONTAINER * self.containers
        )

    def feed(self, chunk: bytes) -> None:
        """Count the next bytes."""
        self.bytes += len(chunk)
        chunk = self._half_escape + chunk
        self._half_escape = b"\\" if (len(chunk) - len(chunk.rstrip(b"\\"))) % 2 else b""
        if self._half_escape:
            chunk = chunk[:-1]
        # Pairs of backslashes first: what is left of a run of them before a quote is what escapes it.
        pieces = chunk.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')
        outside = b",".join(pieces[self._quotes % 2 :: 2])
        self.containers += outside.count(b"[") + outside.count(b"{")
        self.values += outside.count(b",") - max(len(pieces[self._quotes % 2 :: 2]) - 1, 0)
        self._quotes += len(pieces) - 1
