"""Tell Prometheus where the page of metrics of a Ray is that a run started for itself.

Ray does so too with its dashboard, in one file that all dashboards on the machine write in turn.

Invariants: the file stands there whole, from when it is published until it is withdrawn, and names one page. One that outlived
its writer, as after a SIGKILL, is removed by the next that is published: the writer holds a lock on it, which ends with the
process. No two processes write the same file, and a file that Ray writes is never touched.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from rlhf_ray.console import get_logger

NAME = "rlhf_ray_targets_{process}.json"
BEGUN = ".partial"
"""What its name ends in until it is whole."""
BEING_BEGUN_S = 60
"""No process takes that long from making a file to its lock on it."""
JOB = "ray"
"""What Prometheus calls it, as in the file that Ray writes."""


@contextmanager
def published(directory: Path, page: str) -> Iterator[Path]:
    """Name ``page`` (``host:port``) to Prometheus by a file in ``directory``; a file that cannot be written costs a warning."""
    path = directory / NAME.format(process=os.getpid())
    held = None
    try:
        _remove_left_behind(directory)
        held = _write(path, json.dumps([{"labels": {"job": JOB}, "targets": [page]}]))
    except OSError as error:
        get_logger().warning("Prometheus does not see this run: %s cannot be written (%s)", path, error)
    try:
        yield path
    finally:
        if held is not None:
            with suppress(OSError):
                path.unlink()
            held.close()


def _write(path: Path, text: str) -> TextIO:
    """The file, in its place as a whole; the lock on it is held for as long as it is open."""
    partial = path.with_suffix(BEGUN)
    file = partial.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        file.write(text + "\n")
        file.flush()
        partial.replace(path)
    except OSError:
        file.close()
        with suppress(OSError):
            partial.unlink()
        raise
    return file


def _remove_left_behind(directory: Path) -> None:
    whole = directory.glob(NAME.format(process="*"))
    begun = (path for path in directory.glob(f"{Path(NAME).stem.format(process='*')}{BEGUN}") if _is_old(path))
    for path in (*whole, *begun):
        with suppress(OSError), path.open() as file:  # BlockingIOError: its writer lives
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def _is_old(path: Path) -> bool:
    with suppress(OSError):
        return time.time() - path.stat().st_mtime > BEING_BEGUN_S
    return False
