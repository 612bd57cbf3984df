"""Text for terminals of any width, with colours or without, of Unicode or of ASCII alone.

Invariants: no line is wider than the terminal. No text of a run moves the cursor or is read as markup. Without colours a line
holds no escape sequence; with ``ascii_only`` nothing but ASCII.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console, RenderableType
from rich.text import Text

from rlhf_ray.console import printable

LEVELS = "▁▂▃▄▅▆▇█"
ASCII_LEVELS = "_.-=+*#@"


@dataclass(frozen=True)
class Pen:
    """How to draw: ``width`` in columns."""

    width: int
    color: bool = False
    ascii_only: bool = False

    def lines(self, *views: RenderableType) -> list[str]:
        """What stands on each line."""
        stream = io.StringIO()
        console = Console(
            file=stream, width=self.width, force_terminal=self.color, color_system="standard" if self.color else None,
            highlight=False, markup=False, emoji=False, legacy_windows=False, no_color=not self.color,
        )  # fmt: skip
        for view in views:
            console.print(view)
        text = stream.getvalue().rstrip("\n")
        if self.ascii_only:
            text = text.encode("ascii", "replace").decode()
        return [line.rstrip() for line in text.split("\n")] if text else []

    def bar(self, share: float, width: int) -> Text:
        """A bar that is filled to a share of ``width`` columns."""
        full = round(min(max(share, 0.0), 1.0) * width)
        done, left = ("#", ".") if self.ascii_only else ("━", "─")
        return Text(done * full, "cyan") + Text(left * (width - full), "dim")

    def spark(self, values: Sequence[float], width: int) -> str:
        """A curve of one line: the last values, or means of neighbours where there are more than columns."""
        levels = ASCII_LEVELS if self.ascii_only else LEVELS
        if width < 1 or len(values) < 2:
            return ""
        means = squeezed(values, width)
        low, high = min(means), max(means)
        if high == low:
            return levels[0] * len(means)
        return "".join(levels[round((value - low) / (high - low) * (len(levels) - 1))] for value in means)


def squeezed(values: Sequence[float], count: int) -> list[float]:
    """At most ``count`` values: means of neighbours, whose groups differ in size by one at most."""
    if len(values) <= count:
        return list(values)
    edges = [len(values) * number // count for number in range(count + 1)]
    return [math.fsum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def plain(text: str, style: str = "") -> Text:
    """A text of a run, with its control characters shown."""
    return Text(printable(text), style)


def short(value: float) -> str:
    """A number in about four digits."""
    return f"{value:.4g}"
