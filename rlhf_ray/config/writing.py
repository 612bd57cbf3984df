"""Plain values as YAML text: whole configs, and single values in messages.

Invariants: :mod:`rlhf_ray.config.reading` reads what was written as the same values of the same types, as long as texts are
made of printable characters, spaces, tabs and line feeds. So do readers of YAML 1.1, such as PyYAML, with a whole config.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.representer import SafeRepresenter

ENDLESS = 10**6
"""A width at which no value is broken into lines."""
NOT_TEXT_IN_1_1 = re.compile(
    r"y|n|yes|no|on|off|=|<<|[-+]?0b[01_]+|[-+]?\d[\d_]*(:[0-5]?\d)+(\.[\d_]*)?", re.IGNORECASE
)
"""Texts that YAML 1.1, unless they stand in quotes, reads as truth values, numbers in base 2 or 60, or signs of its own."""


def write_mapping(values: Mapping[str, Any]) -> str:
    """A mapping in block style, its keys in their order."""
    return _dump(dict(values), flow=False, width=120)


def write_value(value: Any) -> str:
    """A value on one line."""
    return _dump(value, flow=True, width=ENDLESS).removesuffix("\n").removesuffix("\n...")


def _dump(value: Any, *, flow: bool, width: int) -> str:
    yaml: Any = YAML(typ="safe", pure=True)
    if not flow:
        yaml.Representer = _PortableRepresenter
    yaml.default_flow_style = flow
    yaml.width = width
    yaml.sort_base_mapping_type_on_output = False
    stream = io.StringIO()
    yaml.dump(value, stream)
    return stream.getvalue()


class _PortableRepresenter(SafeRepresenter):
    """Writes texts and numbers so that YAML 1.1 and 1.2 agree on what they are."""

    def represent_text(self, text: str) -> ScalarNode:
        """A text, in quotes where YAML 1.1 would read something else."""
        return self.represent_scalar(
            "tag:yaml.org,2002:str", text, style="'" if NOT_TEXT_IN_1_1.fullmatch(text) else None
        )

    def represent_number(self, number: float) -> ScalarNode:
        """A float; YAML 1.1 knows an exponent only after a point."""
        node = self.represent_float(number)
        if "e" in node.value and "." not in node.value:
            node.value = node.value.replace("e", ".0e")
        return node


_PortableRepresenter.add_representer(str, _PortableRepresenter.represent_text)
_PortableRepresenter.add_representer(float, _PortableRepresenter.represent_number)
