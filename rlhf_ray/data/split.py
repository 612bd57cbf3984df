"""The two halves of a job's data: rows to train on, file by file, and rows held out to evaluate on.

Invariants: no prompt is on both sides of a split that is made here; what is dropped while encoding is counted and logged; an
empty half is an error that names the file and the way out, never a run over nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Generic, TypeVar

from rlhf_ray.config.sections.data import DataConfig, SourceConfig
from rlhf_ray.console import get_logger
from rlhf_ray.data.encode import TOO_LONG, Drops
from rlhf_ray.data.holdout import hold_out
from rlhf_ray.data.order import Part
from rlhf_ray.errors import DataError

Row = TypeVar("Row")
Example = TypeVar("Example")


@dataclass(frozen=True)
class Split(Generic[Row]):
    """Examples to train on, one file after the other, and examples held out."""

    train: list[Row]
    held_out: list[Row]
    parts: list[Part]
    """The files of ``train``: how many examples each has, and how many of them an epoch takes."""
    dropped: Drops = field(default_factory=Drops)
    """How many rows of both halves were dropped, by reason."""


@dataclass(frozen=True)
class Halves(Generic[Row]):
    """Rows before they are encoded: those to train on by file, and those held out."""

    files: list[list[Row]]
    held_out: list[Row]


def read_halves(
    data: DataConfig,
    seed: int,
    read: Callable[[str, SourceConfig, int | None], list[Row]],
    prompt_key: Callable[[Row], Hashable],
) -> Halves[Row]:
    """Read every file with ``read`` (name of its source, the source, how many rows) and hold rows out.

    Held out are the rows of the evaluation file, or a share of the prompts, drawn by ``seed``. Rows with equal
    ``prompt_key`` have the same prompt.
    """
    files = [read(name, source, data.max_rows) for name, source in data.files.items()]
    if data.evaluation_file is not None:
        held_out = read("", data.evaluation_file, None)
        trained = {prompt_key(row) for file in files for row in file}
        return Halves(files, _held_out_rows(held_out, [prompt_key(row) in trained for row in held_out], data))
    return _hold_out_prompts(files, data, seed, prompt_key)


def encode_halves(
    rows: Halves[Row],
    data: DataConfig,
    encode: Callable[[Sequence[Row], Drops], list[Example]],
    limit: str = "data.max_tokens",
) -> Split[Example]:
    """Encode all rows; ``encode`` leaves out those that are dropped and counts them. ``limit`` is the key that bounds a row."""
    sources = [(str(source.rows), source.weight) for source in data.files.values()] or [("the generated world", 1.0)]
    dropped, files = Drops(), []
    for (name, _), file in zip(sources, rows.files, strict=True):
        files.append(_encode_half(name, "training", file, encode, dropped, limit))
    held_out = _encode_half(_held_out_name(data), "held-out", rows.held_out, encode, dropped, limit)
    parts = [Part.weighted(len(file), weight) for (_, weight), file in zip(sources, files, strict=True)]
    return Split(list(chain(*files)), held_out, parts, dropped)


def sources_name(data: DataConfig) -> str:
    """How messages name all training rows of a job."""
    return ", ".join(str(source.rows) for source in data.files.values()) or "the generated world"


def _held_out_name(data: DataConfig) -> str:
    return sources_name(data) if data.evaluation_file is None else str(data.evaluation_file.rows)


def _hold_out_prompts(
    files: list[list[Row]], data: DataConfig, seed: int, prompt_key: Callable[[Row], Hashable]
) -> Halves[Row]:
    fraction, rows = data.evaluation_fraction or 0.0, list(chain(*files))
    held_out = hold_out(list(map(prompt_key, rows)), fraction, seed)
    if fraction and not held_out:
        raise DataError(
            f"{sources_name(data)}: a share of {fraction:g} (data.evaluation_fraction) of {len(rows)} rows holds out no whole "
            "prompt: raise it, or set it to 0 to evaluate nothing"
        )
    first, kept = 0, []
    for file in files:
        kept.append([row for number, row in enumerate(file, first) if number not in held_out])
        first += len(file)
    return Halves(kept, [rows[number] for number in sorted(held_out)])


def _held_out_rows(rows: list[Row], shared: Sequence[bool], data: DataConfig) -> list[Row]:
    """The rows to evaluate on, given which of them have a prompt that is trained on."""
    name = _held_out_name(data)
    if not any(shared):
        return rows
    problem = f"{sum(shared)} of {len(rows)} held-out rows have a prompt that is trained on, but perhaps for how it is written"
    if data.shared_prompts == "refuse":
        raise DataError(
            f"{name}: {problem}, so figures would be too good: leave them out with data.shared_prompts=drop, or keep them with "
            "data.shared_prompts=keep"
        )
    if data.shared_prompts == "keep":
        get_logger("data").warning("%s: %s: figures will be too good (data.shared_prompts)", name, problem)
        return rows
    kept = [row for row, is_shared in zip(rows, shared, strict=True) if not is_shared]
    if not kept:
        raise DataError(f"{name}: every held-out row has a prompt that is trained on: give other rows to evaluate on")
    get_logger("data").warning("%s: %s; they are left out (data.shared_prompts)", name, problem)
    return kept


def _encode_half(
    name: str,
    half: str,
    rows: Sequence[Row],
    encode: Callable[[Sequence[Row], Drops], list[Example]],
    dropped: Drops,
    limit: str,
) -> list[Example]:
    drops = Drops()
    examples = encode(rows, drops)
    reasons = ", ".join(f"{count} {reason}" for reason, count in drops.items())
    way_out = f"raise {limit}, or give other rows" if drops[TOO_LONG] else "give other rows"
    if not examples and (rows or half == "training"):
        purpose = "train" if half == "training" else "evaluate"
        raise DataError(f"{name}: no row is left to {purpose} on ({reasons or 'there were none'}); {way_out}")
    if drops:
        text = f"{name}: of {len(rows)} {half} rows dropped: {reasons}"
        if len(examples) < len(rows) / 2:
            get_logger("data").warning("%s: only %d are left; %s", text, len(examples), way_out)
        else:
            get_logger("data").info("%s", text)
    dropped.update(drops)
    return examples
