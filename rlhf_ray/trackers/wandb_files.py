"""Read which steps the files of wandb hold, which has no reader of its own for Python any more.

Invariant: what is torn at the end of a file, as after a kill, is left out.

A file is a log in LevelDB's format (``doc/log_format.md`` there) after a header of its own; a record is a message of wandb's.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

STILL_S, STILL_AT_MOST_S = 3.0, 60.0
"""A file that has not grown for so long is not being written: wandb's own process ends a moment after the one it serves."""
FILE_HEADER, BLOCK, RECORD_HEADER = 7, 32768, 7
"""Bytes; blocks count from the beginning of the file."""
WHOLE, FIRST, LAST = 1, 2, 4
"""Kinds of pieces; a record lies in one, or in a first one, others and a last one."""


def last_step(folder: Path, run_id: str) -> int:
    """The last step of a run in wandb's files in ``folder``; -1 where there is none."""
    paths, last = sorted(folder.glob(f"*run-*-{run_id}/run-{run_id}.wandb")), -1
    if not paths:
        return last
    from wandb.proto import wandb_internal_pb2

    for path in paths:
        for raw in records(_at_rest(path)):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(raw)
            if record.WhichOneof("record_type") == "history":
                last = max(last, int(record.history.step.num))
    return last


def _at_rest(path: Path) -> bytes:
    """The content of a file once nobody has written to it for a while."""
    by = time.monotonic() + STILL_AT_MOST_S
    while time.time() - os.stat(path).st_mtime < STILL_S and time.monotonic() < by:
        time.sleep(0.1)
    return path.read_bytes()


def records(content: bytes) -> Iterator[bytes]:
    """The records of a file, up to the first that is not whole."""
    at, record = FILE_HEADER, b""
    while at + RECORD_HEADER <= len(content):
        left = BLOCK - at % BLOCK
        if left < RECORD_HEADER:
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        piece = content[at + RECORD_HEADER : at + RECORD_HEADER + length]
        if kind == 0 or len(piece) < length:
            return
        record = piece if kind in (WHOLE, FIRST) else record + piece
        if kind in (WHOLE, LAST):
            yield record
        at += RECORD_HEADER + length
