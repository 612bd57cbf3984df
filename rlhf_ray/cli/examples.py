"""Examples at the end of a command's ``--help``.

Invariant: every example is a whole command that parses; the names of recipes are those that are shipped.
"""

from __future__ import annotations

import argparse
import textwrap
from typing import TypedDict

from rlhf_ray.config.recipes import recipes


class HelpEnd(TypedDict):
    """Keyword arguments of ``add_parser``."""

    epilog: str
    formatter_class: type[argparse.HelpFormatter]


def examples(*commands: str, with_recipes: bool = False) -> HelpEnd:
    """What ``add_parser`` takes to show ``commands``, each a line after ``rlhf-ray``, and the names of the recipes."""
    lines = ["examples:", *(f"  rlhf-ray {command}" for command in commands)]
    if with_recipes:
        names = ", ".join(recipes())
        lines += [
            "",
            "recipes:",
            textwrap.fill(names, 88, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False),
        ]
    return {"epilog": "\n".join(lines), "formatter_class": argparse.RawDescriptionHelpFormatter}
