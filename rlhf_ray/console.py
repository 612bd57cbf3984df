"""Messages for people: the logger, progress bars and tables, all on standard error.

Invariants: standard output stays free for results. A result is on standard output whole, or the command says why it is not.
A text that :func:`printable` returns never moves the cursor of a terminal. Without a terminal a progress bar becomes a log line
every few seconds, so that the logs of jobs stay readable.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from rlhf_ray.errors import StorageError

Item = TypeVar("Item")
SECONDS_BETWEEN_LINES = 10.0


class LastingConsole(Console):
    """A console whose reader may go: what is printed then is lost, and nothing else."""

    def on_broken_pipe(self) -> None:
        """Print nothing from now on; rich's own method ends the process."""
        self.quiet = True


stderr = LastingConsole(stderr=True, highlight=False)


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
    text = io.StringIO()  # rich writes to standard output at the end of a capture, even if there is nothing to write
    Console(file=text, width=120, highlight=False, color_system=None).print(grid)
    return text.getvalue().rstrip()


def write_result(text: str) -> None:
    """Write what a command was asked for to standard output; raises :class:`StorageError` where that takes none of it."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except UnicodeEncodeError as error:
        letters = error.object[error.start : error.end]
        raise StorageError(
            f"standard output is {error.encoding}, which has no {letters[:8]!r}: set PYTHONIOENCODING=utf-8"
        ) from error
    except io.UnsupportedOperation as error:
        raise StorageError("standard output is closed: send it to a file, or to /dev/null") from error
    except BrokenPipeError as error:
        _leave_standard_output()
        raise StorageError("standard output was closed by the program that reads it, so it lacks the end") from error
    except (OSError, ValueError) as error:
        _leave_standard_output()
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise StorageError(f"cannot write to standard output: {reason}. Redirect it to a file that can grow") from error


def _leave_standard_output() -> None:
    """Let Python's end not write again what could not be written."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def printable(text: str) -> str:
    """A text with escapes in place of what a terminal would obey: control characters, but for line breaks and tabs."""
    return "".join(
        letter if letter in "\n\t" or letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def on_one_line(text: str) -> str:
    """The same with line breaks and tabs shown as well."""
    return printable(text).replace("\n", "\\n").replace("\t", "\\t")


def duration(seconds: float) -> str:
    """A time in at most two units that follow one another, such as ``1 h 59 min``; a second one that is 0 is left out."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    counts = [(days, "d"), (hours, "h"), (minutes, "min"), (rest, "s")]
    first = next((place for place, (count, _) in enumerate(counts) if count), len(counts) - 1)
    (most, unit), *others = counts[first : first + 2]
    return " ".join([f"{most} {unit}", *(f"{count} {unit}" for count, unit in others if count)])


def say(text: str) -> None:
    """Print ``text`` on standard error without wrapping it or reading markup in it; a terminal that is gone costs nothing."""
    with suppress(OSError, ValueError):  # ValueError: it was closed in this process
        stderr.print(text, markup=False, soft_wrap=True)
