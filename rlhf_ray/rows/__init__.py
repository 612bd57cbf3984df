"""Rows of data files and data sets: their formats and layouts, and the preferences, prompts and demonstrations in them.

Invariant: importing this package imports none of its modules; a public name imports what it needs.
"""

from __future__ import annotations

from rlhf_ray.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Demonstration": ".demonstrations",
        "PreferencePair": ".preferences",
        "Prompt": ".prompts",
        "Row": ".row",
        "RowSource": ".sources",
        "read_demonstrations": ".demonstrations",
        "read_preferences": ".preferences",
        "read_prompts": ".prompts",
        "read_rows": ".read",
    },
)
