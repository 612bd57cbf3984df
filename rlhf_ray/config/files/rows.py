"""Whether the data files that a config names are there, and hold rows of the kind that the job reads.

Invariant: the first rows of a file are read as the run reads them, and the rest is left to the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from rlhf_ray.config.files.tokenizers import NO_TEMPLATE, read_chat_template, unread_variable
from rlhf_ray.config.problems import Problem, attempt
from rlhf_ray.config.sections.data import DataConfig, SourceConfig
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.config.sections.reward_training import RewardLossConfig
from rlhf_ray.environment import is_hub_id
from rlhf_ray.errors import DataError
from rlhf_ray.rows.demonstrations import DemonstrationReader
from rlhf_ray.rows.labels import KEY
from rlhf_ray.rows.prompts import PromptReader
from rlhf_ray.rows.read import RowReader, first_problem, first_values, read_file

Value = TypeVar("Value")


def data_paths(data: DataConfig) -> Iterator[tuple[str, str]]:
    """The key and the path of every file of rows, as far as the section is there."""
    paths = [("data.path", data.__dict__.get("path")), ("data.evaluation_path", data.__dict__.get("evaluation_path"))]
    for name, source in data.__dict__.get("sources", {}).items():
        paths.append((f"data.sources.{name}.path", source.__dict__.get("path")))
    yield from ((key, path) for key, path in paths if path is not None)


def data_problems(data: DataConfig, row_reader: Callable[[SourceConfig], RowReader[Any]]) -> Iterator[Problem]:
    """What is wrong with the files of ``data``; ``row_reader`` makes what the job reads a file with."""
    names = ["", *data.__dict__.get("sources", {})]  # those that are there: one that is wrong hides no other
    yield from attempt([partial(_file_problems, data, name, row_reader) for name in names], partial=True)
    yield from attempt([partial(_evaluation_file_problems, data, row_reader)], partial=True)


def _file_problems(
    data: DataConfig, name: str, row_reader: Callable[[SourceConfig], RowReader[Any]]
) -> Iterator[Problem]:
    file = data.file(name)
    if file is not None:
        yield from _source_problems(_path_key(name), file, row_reader, data.max_rows)


def _evaluation_file_problems(
    data: DataConfig, row_reader: Callable[[SourceConfig], RowReader[Any]]
) -> Iterator[Problem]:
    if data.evaluation_file is not None:
        key = "data.evaluation_split" if data.evaluation_path is None else "data.evaluation_path"
        yield from _source_problems(key, data.evaluation_file, row_reader, None)


def _source_problems(
    key: str, source: SourceConfig, row_reader: Callable[[SourceConfig], RowReader[Any]], max_rows: int | None
) -> Iterator[Problem]:
    if is_hub_id(source.path):
        return
    path = Path(source.path)
    if not path.exists():
        yield key, f"{path} does not exist: name a data file, as in {key}=pairs.jsonl.gz"
    elif problem := first_problem(source.rows, row_reader(source), max_rows=max_rows):
        yield key, problem


def _path_key(name: str) -> str:
    return f"data.sources.{name}.path" if name else "data.path"


def _first_values(data: DataConfig, make_reader: Callable[[SourceConfig], RowReader[Value]]) -> dict[str, list[Value]]:
    """What the first rows of the training files that lie here hold, by the keys of their paths."""
    return {
        _path_key(name): first_values(file.rows, make_reader(file), max_rows=data.max_rows)
        for name, file in data.files.items()
        if not is_hub_id(file.path) and Path(file.path).exists()
    }


def loss_problems(loss: RewardLossConfig, data: DataConfig) -> Iterator[Problem]:
    """Numbers of pairs that the loss reads and the first rows do not have, or have wrong."""
    for key, pairs in _first_values(data, data.preference_reader).items():
        problem = loss.number_problem([pair.margin for pair in pairs], [pair.grade for pair in pairs])
        if problem:
            yield key, problem


def template_problems(
    model: ModelConfig, data: DataConfig, make_reader: Callable[[SourceConfig], Any]
) -> Iterator[Problem]:
    """Conversations in the first rows, where the tokenizer of ``model`` is known to have no chat template.

    And variables that its template does not read.
    """
    template = read_chat_template(model)
    if data.world is not None or template is None or (template and not data.template_variables):
        return
    talks = {
        key: next((value for value in values if value.is_conversation), None)
        for key, values in _first_values(data, make_reader).items()
    }
    for key, talk in talks.items():
        if talk is not None and not template:
            yield key, f"{talk.where}: {NO_TEMPLATE}"
    problem = unread_variable(template, data.template_variables)
    if problem and template and any(talk is not None for talk in talks.values()):
        yield "data.template_variables", problem


def form_problems(
    readers_of_texts: Mapping[str, str], data: DataConfig, make_reader: Callable[[SourceConfig], PromptReader]
) -> Iterator[Problem]:
    """Reward models, by their keys, that were trained on texts alone, although there are conversations to score."""
    firsts = _first_values(data, make_reader) if readers_of_texts else {}
    talks = [value.where for values in firsts.values() for value in values if value.is_conversation]
    for key, path in readers_of_texts.items() if talks else ():
        yield (
            f"{key}.model.path",
            f"{path} was trained on plain texts (its config.json), but prompts are conversations ({talks[0]}): give a model "
            "that was trained on conversations, or write the prompts as texts",
        )


def label_problems(
    functions: Mapping[str, str], data: DataConfig, make_reader: Callable[[SourceConfig], PromptReader]
) -> Iterator[Problem]:
    """Functions, by their keys, that ask for labels although no row to train on has one."""
    sources = list(data.files.values())
    if not functions or not sources or not all(Path(source.path).exists() for source in sources):
        return
    if any(_has_label(source, make_reader(source)) for source in sources):
        return
    files = ", ".join(source.path for source in sources)
    for key, name in functions.items():
        yield (
            key,
            f"{name} asks for labels, but no row of {files} has one: {KEY}, or "
            + (
                "give the parameter a default (labels=None) if the function can do without"
                if key.endswith(".function")
                else "set it to false"
            ),
        )


def _has_label(source: SourceConfig, reader: PromptReader) -> bool:
    """Whether a row has a label, as far as is known: a row that cannot be read is told about elsewhere."""
    bad_rows: list[str] = []
    try:
        rows = read_file(source.rows, replace(reader, drops_bad_rows=True), bad_rows=bad_rows)
        return any(row.label is not None for row in rows) or bool(bad_rows)
    except DataError:
        return True


def demonstration_problems(key: str, name: str | None, data: DataConfig) -> Iterator[Problem]:
    """What is wrong with a file of demonstrations beside the job's own rows, if there is one."""
    if name is None:
        return
    path = Path(name)
    if not path.exists():
        yield key, f"{path} does not exist: name a file whose rows have a prompt and an answer"
        return
    if problem := first_problem(path, DemonstrationReader(data.prompt_key, data.answer_key, data.apply_chat_template)):
        yield key, problem
