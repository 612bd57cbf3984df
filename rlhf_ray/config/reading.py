"""Reading YAML strictly, and remembering on which line every key stands.

Always true: a key that stands twice in one mapping is an error with both lines; ``1e-5`` is a number; only ``true`` and
``false`` are truth values and only decimal digits are whole numbers (YAML 1.2): ``no``, ``12:30`` and ``010`` are
text; nothing but plain values is ever constructed.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

SEPARATOR = "."
PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")


class _Loader(yaml.SafeLoader):
    """The scalars of YAML 1.2's core schema, with underscores allowed in whole numbers."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012 (the base class's own)


for _tag, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:\.[0-9]+|(?:0|[1-9][0-9_]*)(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", "-+0123456789."),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
    ("merge", r"<<", "<"),
):
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), list(_first))


@dataclass
class Document:
    """The values of a YAML mapping, where each key stands, and what was wrong with it."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    """Dotted key -> ``line 7``."""
    problems: list[str] = field(default_factory=list)

    def origin(self, key: str) -> str:
        """Where ``key`` was set, or the nearest section around it; empty when it stands nowhere."""
        while key:
            if key in self.origins:
                return self.origins[key]
            key = key.rpartition(SEPARATOR)[0]
        return ""


def read_mapping(text: str) -> Document:
    """The mapping in ``text``; an empty text is an empty mapping."""
    document = Document()
    try:
        values = _Reader(document).read(text)
    except yaml.YAMLError as error:
        document.problems.append(_explain(error))
        return document
    if isinstance(values, dict):
        document.values = values
    elif values is not None:
        document.problems.append(f"a config is a mapping of keys to values, but this is {values!r}")
    return document


def read_value(text: str) -> Any:
    """One value as YAML writes it: the right side of an override. Raises ``ValueError`` with what is wrong."""
    document = Document()
    try:
        value = _Reader(document).read(text)
    except yaml.YAMLError as error:
        raise ValueError(_explain(error)) from error
    if document.problems:
        raise ValueError("; ".join(document.problems))
    return value


class _Reader:
    """Walks the nodes of one YAML text, so that lines and doubled keys are known."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.open: list[yaml.Node] = []

    def read(self, text: str) -> Any:
        self.loader = _Loader(text)
        try:
            node = self.loader.get_single_node()
            return None if node is None else self._value(node, "")
        finally:
            self.loader.dispose()

    def _value(self, node: yaml.Node, key: str) -> Any:
        if any(node is outer for outer in self.open):
            raise yaml.MarkedYAMLError(problem="an alias stands inside of what it names", problem_mark=node.start_mark)
        self.open.append(node)
        try:
            if not isinstance(node, yaml.ScalarNode) and node.tag not in PLAIN_TAGS:
                raise yaml.MarkedYAMLError(problem=f"the tag {node.tag} is refused", problem_mark=node.start_mark)
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, key)
            if isinstance(node, yaml.SequenceNode):
                return [self._value(item, f"{key}{SEPARATOR}{index}") for index, item in enumerate(node.value)]
            return self._scalar(node)
        finally:
            self.open.pop()

    def _scalar(self, node: yaml.Node) -> Any:
        value = self.loader.construct_object(node)
        if isinstance(value, float) and math.isinf(value) and "inf" not in node.value.lower():
            return node.value  # a commit hash such as 12e4567
        return value

    def _mapping(self, node: yaml.MappingNode, key: str) -> dict[str, Any]:
        self._refuse_doubled(node, key)
        self.loader.flatten_mapping(node)
        values = {}
        for name_node, value_node in node.value:
            name = str(name_node.value)
            path = f"{key}{SEPARATOR}{name}" if key else name
            self.document.origins[path] = f"line {name_node.start_mark.line + 1}"
            values[name] = self._value(value_node, path)
        return values

    def _refuse_doubled(self, node: yaml.MappingNode, key: str) -> None:
        lines: dict[str, int] = {}
        for name_node, _ in node.value:
            if not isinstance(name_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key is one word", problem_mark=name_node.start_mark)
            name, line = str(name_node.value), name_node.start_mark.line + 1
            path = f"{key}{SEPARATOR}{name}" if key else name
            if name in lines:
                text = f"{path}: stands twice, on line {lines[name]} and on line {line}; remove one"
                self.document.problems.append(text)
            lines.setdefault(name, line)


def _explain(error: yaml.YAMLError) -> str:
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return f"not YAML: {error}"
    mark = error.problem_mark
    context = f"{error.context}, " if error.context else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: not YAML: {context}{error.problem}"
