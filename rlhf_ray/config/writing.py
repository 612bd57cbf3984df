"""Plain values as YAML text: whole configs, and single values in messages.

Invariant: :mod:`rlhf_ray.config.reading` reads what was written as the same values of the same types, as long as texts are
made of printable characters, spaces, tabs and line feeds.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML

ENDLESS = 10**6
"""A width at which no value is broken into lines."""


def write_mapping(values: Mapping[str, Any]) -> str:
    """A mapping in block style, its keys in their order."""
    return _dump(dict(values), flow=False, width=120)


def write_value(value: Any) -> str:
    """A value on one line."""
    return _dump(value, flow=True, width=ENDLESS).removesuffix("\n").removesuffix("\n...")


def _dump(value: Any, *, flow: bool, width: int) -> str:
    yaml: Any = YAML(typ="safe", pure=True)
    yaml.default_flow_style = flow
    yaml.width = width
    yaml.sort_base_mapping_type_on_output = False
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()
