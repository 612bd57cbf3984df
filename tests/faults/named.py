"""Choose cases by words of the command line. Always true: a word that no name holds is refused, not taken for none."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


def chosen(program: str, cases: Mapping[str, T], arguments: Sequence[str] | None = None) -> dict[str, T]:
    """The cases whose names hold one of the words, or all where there are no words."""
    parser = argparse.ArgumentParser(prog=program, description=f"cases: {', '.join(cases)}")
    parser.add_argument("words", nargs="*", metavar="WORD", help="try the cases whose names hold this (default: all)")
    words: list[str] = parser.parse_args(arguments).words
    for word in words:
        if not any(word in name for name in cases):
            parser.error(f"no case has {word!r} in its name; cases: {', '.join(cases)}")
    return {name: case for name, case in cases.items() if not words or any(word in name for word in words)}
