"""Messages for people: the logger, progress bars and tables, all on standard error.

Invariants: standard output stays free for results. Without a terminal a progress bar becomes a log line every few seconds,
so that the logs of jobs stay readable.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10.0

stderr = Console(stderr=True, highlight=False)


def get_logger(name: str = "rlhf_ray") -> logging.Logger:
    """The project's logger, or the child logger called ``name``."""
    root = logging.getLogger("rlhf_ray")
    if not root.handlers:
        root.addHandler(_handler())
        root.setLevel(logging.INFO)
        root.propagate = False
    return root if name == "rlhf_ray" else root.getChild(name.removeprefix("rlhf_ray."))


def _handler() -> logging.Handler:
    if sys.stderr.isatty():
        return RichHandler(console=stderr, show_path=False, log_time_format="%H:%M:%S")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
    return handler


def progress(items: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield ``items`` and show how many of ``total`` are done; ``total`` defaults to ``len(items)`` of a sequence."""
    if total is None and isinstance(items, Sequence):
        total = len(items)
    return _bar(items, description, total) if stderr.is_terminal else _lines(items, description, total)


def _bar(items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True) as bar:
        yield from bar.track(items, total=total, description=description)


def _lines(items: Iterable[Item], description: str, total: int | None) -> Iterator[Item]:
    logger, last_line_at = get_logger(), time.monotonic()
    for count, item in enumerate(items, 1):
        yield item
        if time.monotonic() - last_line_at >= SECONDS_BETWEEN_LINES:
            last_line_at = time.monotonic()
            logger.info("%s: %d%s", description, count, "" if total is None else f" of {total}")


def table(title: str, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Format a table as text, for a log line or an error message."""
    grid = Table(title=title, title_justify="left")
    for header in headers:
        grid.add_column(header)
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    console = Console(width=120, highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(grid)
    return capture.get().rstrip()


def say(text: str) -> None:
    """Print ``text`` on standard error without wrapping it or reading markup in it."""
    stderr.print(text, markup=False, soft_wrap=True)
