"""Strict YAML for configs: every key with its line, every mistake with its place.

Texts are read as YAML 1.2 by ruamel.yaml: ``1e-5`` is a number, only ``true`` and ``false`` are truth values, and ``no``
and ``12:30`` are texts. Going beyond YAML 1.2, what looks like a date or like a number with a leading zero or a base
(``010``, ``0x10``) stays text too: in a config it is a name, such as a revision.

Invariants: a key that stands twice in one mapping is a problem that names both lines; nothing but plain values is made. A text
of any content takes little more time and memory than its length: one that nests too deep, or whose aliases make too much of it,
is a problem too.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.nodes import MappingNode, Node, ScalarNode

SEPARATOR = "."
PLAIN_TAGS = ("tag:yaml.org,2002:map", "tag:yaml.org,2002:seq")
NAMES_LIKE_NUMBERS = re.compile(r"=|[-+]?0[0-9box_][0-9a-fA-F_.]*|\d{4}-\d\d?-\d\d?.*|_+")
"""Plain scalars that YAML 1.2 or its extensions turn into numbers or dates, and that stay texts here."""


LONGEST = 2**20
"""Characters of a config; the shipped ones have a few thousand."""
MOST_LEVELS = 200
MOST_VALUES = 20_000
"""Values of a config with its aliases written out."""


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
    except UNREADABLE as error:
        document.problems.append(_explain(error))
        return document
    if isinstance(values, dict):
        document.values = values
    elif values is not None:
        shown = f"{str(values)[:80]!r}" if isinstance(values, str) else repr(values)[:80]
        document.problems.append(f"a config is a mapping of keys to values, but this is {shown}")
    return document


def read_value(text: str) -> Any:
    """One value as YAML writes it: the right side of an override. Raises ``ValueError`` with what is wrong."""
    document = Document()
    try:
        value = _Reader(document).read(text)
    except UNREADABLE as error:
        raise ValueError(_explain(error)) from error
    if document.problems:
        raise ValueError("; ".join(document.problems))
    return value


UNREADABLE = (YAMLError, RecursionError)


class _Reader:
    """Walks the nodes of one YAML text, so that lines and doubled keys are known."""

    def __init__(self, document: Document) -> None:
        self.document = document
        self.yaml = YAML(typ="safe", pure=True)
        self.outer: list[Node] = []
        """The nodes around the one that is read."""

    def read(self, text: str) -> Any:
        if len(text) > LONGEST:
            raise YAMLError(
                f"it has {len(text)} characters, and a config has {LONGEST} at most: is it the file that is meant?"
            )
        if _deepest(text) > MOST_LEVELS:  # which the parser would take minutes to find
            raise RecursionError
        node = self.yaml.compose(text)
        if node is None:
            return None
        _require_few(node)
        return self._value(node, "")

    def _value(self, node: Node, key: str) -> Any:
        if any(node is outer for outer in self.outer):
            raise MarkedYAMLError(problem="an alias stands inside of what it names", problem_mark=node.start_mark)
        if not isinstance(node, ScalarNode) and node.tag not in PLAIN_TAGS:
            raise MarkedYAMLError(problem=f"the tag {node.tag} is refused", problem_mark=node.start_mark)
        self.outer.append(node)
        try:
            if isinstance(node, ScalarNode):
                return self._scalar(node)
            if isinstance(node, MappingNode):
                return self._mapping(node, key)
            return [self._value(item, f"{key}{SEPARATOR}{index}") for index, item in enumerate(node.value)]
        finally:
            self.outer.pop()

    def _scalar(self, node: ScalarNode) -> Any:
        text = str(node.value)
        if not node.style and NAMES_LIKE_NUMBERS.fullmatch(text):  # a style is a pair of quotes or a block
            return text
        try:
            value = self.yaml.constructor.construct_object(node)
        except (ValueError, OverflowError) as error:  # a number of more digits than Python reads, a date that is none
            raise MarkedYAMLError(
                problem=f"{text[:20]!r} ... cannot be read: {str(error).partition(';')[0]}",
                problem_mark=node.start_mark,
            ) from error
        if isinstance(value, float) and math.isinf(value) and "inf" not in text.lower():
            return text  # a commit hash such as 12e4567
        return _join_surrogates(value, node) if isinstance(value, str) else value

    def _mapping(self, node: MappingNode, key: str) -> dict[str, Any]:
        self._report_doubled_keys(node, key)
        self.yaml.constructor.flatten_mapping(node)  # puts merged keys (<<) before the mapping's own
        values = {}
        for name_node, value_node in node.value:
            path = _join(key, name_node)
            self.document.origins[path] = f"line {_line(name_node)}"
            values[str(name_node.value)] = self._value(value_node, path)
        return values

    def _report_doubled_keys(self, node: MappingNode, key: str) -> None:
        lines: dict[str, int] = {}
        for name_node, _ in node.value:
            if not isinstance(name_node, ScalarNode):
                raise MarkedYAMLError(problem="a key is one word", problem_mark=name_node.start_mark)
            path, line = _join(key, name_node), _line(name_node)
            if path in lines:
                text = f"{path}: stands twice, on line {lines[path]} and on line {line}; remove one"
                self.document.problems.append(text)
            lines.setdefault(path, line)


def _deepest(text: str) -> int:
    """How many brackets are open at most, those in quoted texts included."""
    steps = {"[": 1, "{": 1, "]": -1, "}": -1}
    return max(accumulate(steps[bracket] for bracket in re.findall(r"[\[\]{}]", text)), default=0)


def _require_few(root: Node) -> None:
    """Refuse a document that would have too many values with its aliases written out, without writing them out."""
    counts: dict[int, int] = {}

    def count(node: Node) -> int:
        if id(node) not in counts:
            counts[id(node)] = 0  # of a node that is around itself, which is refused where it is read
            parts = [part for item in node.value for part in (item if isinstance(item, tuple) else (item,))]
            counts[id(node)] = 1 + (0 if isinstance(node, ScalarNode) else sum(map(count, parts)))
        return counts[id(node)]

    if count(root) > MOST_VALUES:
        raise MarkedYAMLError(
            problem=f"it stands for more than {MOST_VALUES} values with its aliases (*) written out: shorten it",
            problem_mark=root.start_mark,
        )


def _join(key: str, name: Node) -> str:
    return f"{key}{SEPARATOR}{name.value}" if key else str(name.value)


def _join_surrogates(text: str, node: Node) -> str:
    """``text`` with one character for each pair of surrogates, which is how JSON escapes an emoji."""
    try:
        return text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise MarkedYAMLError(problem="a text holds half of a surrogate pair", problem_mark=node.start_mark) from error


def _line(node: Node) -> int:
    return int(node.start_mark.line) + 1  # marks count from 0


def _explain(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "not YAML that is read here: it is nested too deep"
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return f"not YAML: {error}"
    mark = error.problem_mark
    context = f"{error.context}, " if error.context else ""
    return f"line {mark.line + 1}, column {mark.column + 1}: not YAML: {context}{error.problem}"
