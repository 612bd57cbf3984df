"""The rows that a config names, ready to be trained on: read, encoded, counted, split, mixed.

Always true: everything is read before a cluster is joined; no prompt is on both sides of a split that is made here; what is
dropped is counted and said; an empty result is an error that names the file and the way out, never a run over nothing;
prompts of both halves are numbered through.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Generic, TypeVar

import numpy
import torch

from rlhf_ray.config.sections.data import DataConfig, SourceConfig, WorldConfig
from rlhf_ray.console import get_logger
from rlhf_ray.data.encode import Drops, encode_demonstrations, encode_prompts, prompt_text
from rlhf_ray.data.encoded_pairs import PairExample, PairFile, PairRow, pairs_of_file, pairs_of_rows
from rlhf_ray.data.holdout import hold_out
from rlhf_ray.data.order import Part
from rlhf_ray.errors import DataError
from rlhf_ray.rows.demonstrations import Demonstration
from rlhf_ray.rows.preferences import PAIR_NUMBERS
from rlhf_ray.rows.prompts import Prompt
from rlhf_ray.rows.read import read_file
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.world.generate import World

Row = TypeVar("Row")
Example = TypeVar("Example")


@dataclass(frozen=True)
class TokenizedPrompt:
    """A prompt of the run: what is sampled from, and what its samples are judged by."""

    prompt_id: int
    text: str
    token_ids: tuple[int, ...]
    label: str | None = None
    messages: tuple[Mapping[str, str], ...] | None = None
    """The conversation that the prompt is, where it is one."""
    source: str = ""


@dataclass(frozen=True)
class Split(Generic[Row]):
    """Rows to train on, one file after the other, and rows held out."""

    train: list[Row]
    held_out: list[Row]
    parts: list[Part]
    """The files of ``train``: how many rows each has, and how many of them an epoch takes."""
    dropped: Drops = field(default_factory=Drops)
    """How many rows of both halves were dropped, by reason."""


@dataclass(frozen=True)
class _Rows(Generic[Row]):
    """Rows before they are encoded: those to train on by file, and those held out."""

    files: list[list[Row]]
    held_out: list[Row]


@dataclass(frozen=True)
class DemonstrationExample:
    """Token ids of a demonstration and which of them are the answer."""

    token_ids: list[int]
    action_mask: list[bool]


def demonstration_examples(data: DataConfig, tokenizer: Any, seed: int) -> Split[DemonstrationExample]:
    """Encoded demonstrations of the world or of files."""
    if data.world is not None:
        world = World(data.world.seed, data.world.raters)
        arithmetic = data.world.task == "arithmetic"
        demonstrations = world.arithmetic_demonstrations if arithmetic else world.demonstrations
        rows = _Rows([demonstrations(data.world.demonstrations)], demonstrations(500, "evaluation"))
    else:

        def read(name: str, source: SourceConfig, max_rows: int | None) -> list[Demonstration]:
            return list(read_file(source.rows, data.demonstration_reader(source), max_rows=max_rows))

        rows = _read(data, seed, read, lambda row: row.prompt)

    def encode(half: Sequence[Demonstration], drops: Drops) -> list[DemonstrationExample]:
        encoded = encode_demonstrations(tokenizer, half, data.max_tokens, drops)
        return [DemonstrationExample(*one) for one in encoded if one is not None]

    return _encoded(rows, data, encode)


def pair_examples(data: DataConfig, tokenizer: Any, seed: int) -> Split[PairExample]:
    """Encoded preference pairs of the world or of files; those held out of the world have no flipped labels."""
    cut_prompt = data.too_long == "cut_prompt"

    def read(name: str, source: SourceConfig, max_rows: int | None) -> list[PairRow]:
        file = PairFile(source.rows, data.preference_reader(source), data.max_tokens, cut_prompt, max_rows)
        return pairs_of_file(file, tokenizer, data.cache, source=name)

    if data.world is not None:
        world = World(data.world.seed, data.world.raters)
        made = (
            world.preferences(data.world.pairs),
            world.preferences(data.world.evaluation_pairs, "evaluation", flipped=0.0),
        )
        train, held_out = (pairs_of_rows(rows, tokenizer, data.max_tokens, cut_prompt=cut_prompt) for rows in made)
        rows = _Rows([train], held_out)
    else:
        rows = _read(data, seed, read, lambda row: row.prompt)

    def kept(half: Sequence[PairRow], drops: Drops) -> list[PairExample]:
        drops.update(row.pair for row in half if isinstance(row.pair, str))
        return [row.pair for row in half if isinstance(row.pair, PairExample)]

    examples = _encoded(rows, data, kept)
    _check_labels(examples.train, _name(data))
    cut = sum(pair.cut > 0 for pair in chain(examples.train, examples.held_out))
    if cut:
        get_logger("data").info("%s: %d prompts were cut at their beginning (data.too_long)", _name(data), cut)
    return examples


def tokenized_prompts(data: DataConfig, tokenizer: Any, seed: int) -> Split[TokenizedPrompt]:
    """Encoded prompts of the world or of files; those held out continue the numbers."""

    def read(name: str, source: SourceConfig, max_rows: int | None) -> list[Prompt]:
        rows = read_file(source.rows, data.prompt_reader(source), max_rows=max_rows)
        return [row if row.source else replace(row, source=name) for row in rows]

    rows = _read(data, seed, read, _prompt_key) if data.world is None else _world_prompts(data.world)
    files, first = [], 0
    for file in rows.files:
        files.append(list(enumerate(file, first)))
        first += len(file)
    numbered = _Rows(files, list(enumerate(rows.held_out, first)))

    def encode(half: Sequence[tuple[int, Prompt]], drops: Drops) -> list[TokenizedPrompt]:
        encoded = encode_prompts(tokenizer, [row for _, row in half], data.max_prompt_tokens, drops)
        return [
            TokenizedPrompt(
                number,
                prompt_text(tokenizer, row),
                tuple(ids),
                row.label,
                source=row.source,
                messages=None if row.messages is None else tuple(row.messages),
            )
            for (number, row), ids in zip(half, encoded, strict=True)
            if ids is not None
        ]

    return _encoded(numbered, data, encode)


def _world_prompts(made: WorldConfig) -> _Rows[Prompt]:
    world = World(made.seed, made.raters)
    if made.task == "arithmetic":
        halves = world.arithmetic_prompts("ppo"), world.arithmetic_prompts("evaluation")
        return _Rows([halves[0][: made.prompts]], halves[1][: made.evaluation_prompts])
    return _Rows([world.prompts("ppo", made.prompts)], world.prompts("evaluation", made.evaluation_prompts))


# --------------------------------------------------------------------------------------------------------------- files


def _prompt_key(row: Prompt) -> Hashable:
    """The same for two rows with the same prompt."""
    return row.text or json.dumps([row.messages, row.tools], sort_keys=True)


def _read(
    data: DataConfig,
    seed: int,
    read: Callable[[str, SourceConfig, int | None], list[Row]],
    prompt_of: Callable[[Row], Hashable],
) -> _Rows[Row]:
    """Rows of every file; held out are those of ``evaluation_path``, or a share of the prompts, drawn by ``seed``."""
    files = [read(name, source, data.max_rows) for name, source in data.files.items()]
    if data.evaluation_file is not None:
        held_out = read("", data.evaluation_file, None)
        _warn_of_shared_prompts(
            {prompt_of(row) for file in files for row in file}, list(map(prompt_of, held_out)), data
        )
        return _Rows(files, held_out)
    fraction = data.evaluation_fraction or 0.0
    rows = list(chain(*files))
    chosen = hold_out(list(map(prompt_of, rows)), fraction, seed)
    if fraction and not chosen:
        raise DataError(
            f"{_name(data)}: a share of {fraction:g} (data.evaluation_fraction) of {len(rows)} rows holds out no whole prompt: "
            "raise it, or set it to 0 to evaluate nothing"
        )
    number, kept = 0, []
    for file in files:
        kept.append([row for place, row in enumerate(file, number) if place not in chosen])
        number += len(file)
    return _Rows(kept, [rows[place] for place in sorted(chosen)])


def _warn_of_shared_prompts(trained: set[Hashable], held_out: list[Hashable], data: DataConfig) -> None:
    shared = sum(prompt in trained for prompt in held_out)
    if shared:
        get_logger("data").warning(
            "%s: %d of %d held-out rows have a prompt that is trained on: figures will be too good",
            _held_out_name(data),
            shared,
            len(held_out),
        )


def _name(data: DataConfig) -> str:
    return ", ".join(str(source.rows) for source in data.files.values()) or "the generated world"


def _held_out_name(data: DataConfig) -> str:
    return _name(data) if data.evaluation_file is None else str(data.evaluation_file.rows)


def _encoded(
    rows: _Rows[Row], data: DataConfig, encode: Callable[[Sequence[Row], Drops], list[Example]]
) -> Split[Example]:
    """Encode all rows and say what was dropped."""
    sources = [(str(source.rows), source.weight) for source in data.files.values()] or [("the generated world", 1.0)]
    dropped, files = Drops(), []
    for (path, _), file in zip(sources, rows.files, strict=True):
        files.append(_counted(path, "training", file, encode, dropped))
    held_out = _counted(_held_out_name(data), "held-out", rows.held_out, encode, dropped)
    parts = [Part.weighted(len(file), weight) for (_, weight), file in zip(sources, files, strict=True)]
    return Split(list(chain(*files)), held_out, parts, dropped)


def _counted(
    path: str, half: str, rows: Sequence[Row], encode: Callable[[Sequence[Row], Drops], list[Example]], dropped: Drops
) -> list[Example]:
    drops = Drops()
    examples = encode(rows, drops)
    told = ", ".join(f"{count} {reason}" for reason, count in drops.items())
    if not examples and (rows or half == "training"):
        purpose = "train" if half == "training" else "evaluate"
        raise DataError(f"{path}: no row is left to {purpose} on ({told or 'there were none'}); raise data.max_tokens or "
                        "data.max_prompt_tokens, or give other rows")  # fmt: skip
    if drops:
        get_logger("data").info("%s: of %d %s rows dropped: %s", path, len(rows), half, told)
    dropped.update(drops)
    return examples


def _check_labels(pairs: Sequence[PairExample], name: str) -> None:
    """Refuse numbers that only some pairs have and grades that never differ; warn of a side that never does."""
    for column in PAIR_NUMBERS:
        count = sum(getattr(pair, column) is not None for pair in pairs)
        if 0 < count < len(pairs):
            raise DataError(f"{name}: {count} of {len(pairs)} pairs have a {column!r}: fill it in all files or none")
    grades = {pair.grade for pair in pairs}
    if len(pairs) > 1 and len(grades) == 1 and None not in grades:
        raise DataError(
            f"{name}: 'grade' is {pairs[0].grade:g} in all {len(pairs)} pairs, from which no grade can be learned: leave the "
            "column out, or give pairs of several grades"
        )
    for side in ("chosen", "rejected"):
        answers = (tuple(getattr(pair, side)[pair.prompt_length :]) for pair in pairs)
        first = next(answers)
        if len(pairs) > 1 and all(answer == first for answer in answers):
            get_logger("data").warning("%s: the %s answer is the same in all %d pairs", name, side, len(pairs))


# -------------------------------------------------------------------------------------------------------------- batches


def demonstration_batch(examples: Sequence[DemonstrationExample]) -> TrajectoryBatch:
    """One sequence an example."""
    return TrajectoryBatch.from_sequences(
        [example.token_ids for example in examples], action_mask=[example.action_mask for example in examples]
    )


def pair_batch(examples: Sequence[PairExample]) -> TrajectoryBatch:
    """Sequence 2i is chosen, 2i+1 rejected, each with its pair's ``margin`` and ``grade`` where the pairs have them."""
    sides = [numpy.asarray(side) for example in examples for side in (example.chosen, example.rejected)]
    offsets = numpy.concatenate([[0], numpy.cumsum([len(side) for side in sides])])
    columns = {"token_ids": torch.from_numpy(numpy.concatenate(sides).astype(numpy.int64))}
    for name in PAIR_NUMBERS:
        numbers = [getattr(example, name) for example in examples]
        if None not in numbers:
            columns[name] = torch.tensor(numbers, dtype=torch.float32).repeat_interleave(2)
    return TrajectoryBatch(torch.from_numpy(offsets.astype(numpy.int64)), columns)
