"""docs/openrlhf.md gives every flag of OpenRLHF the answer that the command line gives."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from rlhf_ray.config.openrlhf.flags import FLAGS, Answer
from rlhf_ray.config.openrlhf.older import GONE, RENAMED

PAGE = Path(__file__).parents[2] / "docs" / "openrlhf.md"


def cells_of(answer: Answer) -> str:
    """The columns after the flags."""
    if not answer.keys:
        return f"no counterpart: {answer.note}"
    keys = ", ".join(f"`{key}`" for target in answer.keys for key in target.split("|"))
    return f"{keys} ({answer.note})" if answer.note else keys


def rows_wanted() -> Iterator[str]:
    """A row for each answer, with all flags that have it."""
    flags: dict[Answer, list[str]] = {}
    for flag, answer in FLAGS.items():
        flags.setdefault(answer, []).append(flag)
    for answer, names in flags.items():
        yield f"| {', '.join(f'`{name}`' for name in names)} | {cells_of(answer)} |"


def older_rows_wanted() -> Iterator[str]:
    """A row for each older name that became another flag, or that has an answer of its own."""
    yield from (f"| `{name}` | as `{flag}` |" for name, flag in RENAMED.items())
    yield from (f"| `{name}` | {cells_of(answer)} |" for name, answer in GONE.items())


def test_the_page_says_what_the_command_line_says():
    text = PAGE.read_text()
    for heading, wanted in (("Flags of 0.11.2", rows_wanted()), ("Older names", older_rows_wanted())):
        (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
        rows = [line for line in section.splitlines() if line.startswith("| `")]
        expected = list(wanted)
        assert rows == expected, f"docs/openrlhf.md, '## {heading}' must be:\n" + "\n".join(expected)
