"""Small rows and what they mean, for the tests of this room."""

from __future__ import annotations

from typing import Any

from rlhf_ray.config.sections.data import DataConfig
from rlhf_ray.rows.preferences import PreferencePair
from rlhf_ray.rows.read import first_problem, read_file


def said(role: str, *texts: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text} for text in texts]


def talk(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]


def words(part: Any) -> str:
    """The text of a side, whether it is a text or messages of one role after the other."""
    return part if isinstance(part, str) else "/".join(message["content"] for message in part)


def pairs_of(write: Any, *rows: dict[str, Any], **keys: Any) -> list[PreferencePair]:
    """The pairs of a file of these rows, as a job with these keys of its data section reads them."""
    data = DataConfig.model_validate({"path": str(write(list(rows))), "evaluation_fraction": 0.0, **keys})
    (source,) = data.files.values()
    reader = data.preference_reader(source)
    assert first_problem(source.rows, reader) == ""
    return list(read_file(source.rows, reader))


def meanings(pairs: list[PreferencePair]) -> list[tuple[Any, ...]]:
    return [(words(pair.prompt), words(pair.chosen), words(pair.rejected), pair.grade) for pair in pairs]
