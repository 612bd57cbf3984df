"""Settings of tasks on a command line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rlhf_ray.errors import RequestError


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` as a mapping; a value is JSON, or else a text. :class:`RequestError` for anything else."""
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise RequestError(f"{pair!r}: write settings as KEY=VALUE")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings
