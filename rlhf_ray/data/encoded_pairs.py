"""Preference pairs as they are trained on: token ids, numbers and sources, encoded once and kept for later runs.

Invariants: one entry a row, in the order of the file, whether its pair is used or dropped; what is read from the cache is
what encoding the file again would give.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from rlhf_ray.config.sections.roles import Form
from rlhf_ray.data.cache import hash_content, load_or_make, make_key
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.encode import EncodedPair, encode_in_parts, encode_pair_part, without_refused_pairs
from rlhf_ray.data.template_losses import report_losses
from rlhf_ray.data.tokenizers import encoding_fingerprint
from rlhf_ray.errors import DataError
from rlhf_ray.rows.preferences import PreferencePair, PreferenceReader
from rlhf_ray.rows.read import read_file, report_bad_rows
from rlhf_ray.rows.same_prompt import hash_prompt
from rlhf_ray.rows.sources import RowSource, content_files

FORMAT = 6
"""To be raised when a change of the code gives another table for the same file and settings."""
IDS = pa.large_list(pa.int32())
BAD_ROWS = b"bad rows"
"""Where a table keeps the places of the rows that were left out, and what is wrong with them."""
SCHEMA = pa.schema(
    {
        "prompt": pa.string(),
        "problem": pa.string(),
        "chosen": IDS,
        "rejected": IDS,
        "prompt_length": pa.int32(),
        "cut": pa.int32(),
        "chosen_answer": pa.int32(),
        "rejected_answer": pa.int32(),
        "losses": pa.list_(pa.string()),
        "margin": pa.float64(),
        "grade": pa.float64(),
        "source": pa.string(),
        "form": pa.string(),
    }
)


@dataclass(frozen=True, eq=False)
class PairExample:
    """Token ids of a preference pair, the prompt before both answers, and what its row says beside them."""

    chosen: Sequence[int]
    rejected: Sequence[int]
    margin: float | None = None
    grade: float | None = None
    """By how much the chosen side is better: 0 is a tie."""
    source: str = ""
    prompt_length: int = 0
    """Tokens of the prompt, the same in both sides."""
    cut: int = 0
    """Tokens that the prompt has lost."""
    form: Form = "text"
    """Whether prompt and answers are texts, or messages that the chat template has written."""
    chosen_answer: int = 0
    """Tokens of the better answer at the end of its side; of its last message, where it has several."""
    rejected_answer: int = 0
    """The same of the worse answer."""
    reference: tuple[float, float] | None = None
    """The log-probs in nats of the better and the worse answer under the model that training starts from, where they are
    known."""


class PairRow(NamedTuple):
    """What became of one row."""

    prompt: str
    """A hash that two rows share if they have the same prompt and tools, but for how the prompt is written."""
    pair: PairExample | str
    """The pair, or the reason why it is dropped."""
    losses: Sequence[str] | None = None
    """What the chat template leaves out of a conversation; none of texts, and of pairs that are dropped."""


@dataclass(frozen=True)
class PairFile:
    """A file or data set of preferences and how it is read: with the tokenizer, all that decides what its pairs are."""

    rows: RowSource
    reader: PreferenceReader
    max_tokens: int
    cut_prompt: bool = False
    """Whether the prompt of a pair that is too long loses its beginning; else the pair is dropped."""
    max_rows: int | None = None


def encode_pair_file(
    file: PairFile, chat: ChatFormat, cache: str | Path | None = None, *, source: str = ""
) -> list[PairRow]:
    """Encode every row of a file, or take them from the folder ``cache`` if they lie there.

    ``source`` is the source of rows that name none.
    """

    def encode() -> pa.Table:
        bad_rows: list[str] = []
        rows = list(read_file(file.rows, file.reader, max_rows=file.max_rows, bad_rows=bad_rows))
        if file.reader.drops_bad_rows:
            rows = without_refused_pairs(chat, rows, bad_rows)
        if not rows:
            raise DataError(f"{file.rows}: all {len(bad_rows)} rows are bad, so none is left; the first: {bad_rows[0]}")
        table = _encode_table(rows, chat, file.max_tokens, cut_prompt=file.cut_prompt)
        return table.replace_schema_metadata({BAD_ROWS: json.dumps(bad_rows)})

    def read(table: pa.Table) -> list[PairRow]:
        report_bad_rows(file.rows, json.loads(table.schema.metadata[BAD_ROWS]))
        return _said(file, chat, _read_table(table, source))

    if cache is None:
        return read(encode())
    settings = asdict(file)
    del settings["rows"]["path"]  # where the rows lie does not count, what they are does
    identity = {
        "format": FORMAT,
        "settings": settings,
        "content": hash_content(*content_files(file.rows)),
        "tokenizer": encoding_fingerprint(chat.tokenizer),
        "template_variables": dict(chat.variables),
        "day": chat.day,
    }
    return read(load_or_make(cache, f"pairs-{make_key(identity)}", encode))


def _said(file: PairFile, chat: ChatFormat, rows: list[PairRow]) -> list[PairRow]:
    """The rows, once it is said what the chat template leaves out of them."""
    losses = [(f"row {number}", row.losses) for number, row in enumerate(rows, 1) if row.losses is not None]
    report_losses(chat, str(file.rows), losses)
    return rows


def encode_pair_rows(
    rows: Sequence[PreferencePair], chat: ChatFormat, max_tokens: int, *, cut_prompt: bool = False
) -> list[PairRow]:
    """Encode rows that are in memory already."""
    return _read_table(_encode_table(rows, chat, max_tokens, cut_prompt=cut_prompt))


def _encode_table(rows: Sequence[PreferencePair], chat: ChatFormat, max_tokens: int, *, cut_prompt: bool) -> pa.Table:
    """Part by part, so that little besides the table is in memory at once."""

    def encode(part: Sequence[PreferencePair]) -> pa.Table:
        return _make_table(part, encode_pair_part(chat, part, max_tokens, cut_prompt=cut_prompt))

    parts = list(encode_in_parts(rows, "pairs", encode))
    return pa.concat_tables(parts) if parts else _make_table([], [])


def _make_table(rows: Sequence[PreferencePair], outcomes: Sequence[EncodedPair | str]) -> pa.Table:
    pairs = [EncodedPair([], [], 0) if isinstance(outcome, str) else outcome for outcome in outcomes]
    columns = {
        "prompt": [hash_prompt(row.prompt, row.tools, nearly=True) for row in rows],
        "problem": [outcome if isinstance(outcome, str) else "" for outcome in outcomes],
        **{name: [getattr(pair, name) for pair in pairs] for name in EncodedPair._fields},
        **{name: [getattr(row, name) for row in rows] for name in ("margin", "grade", "source")},
        "form": ["conversation" if row.texts is None else "text" for row in rows],
    }
    return pa.table(columns, schema=SCHEMA)


def _read_table(table: pa.Table, source: str = "") -> list[PairRow]:
    chosen, rejected = _id_views(table["chosen"]), _id_views(table["rejected"])
    names = (
        "prompt", "problem", "losses", "margin", "grade", "source", "prompt_length", "cut", "form", "chosen_answer",
        "rejected_answer",
    )  # fmt: skip
    columns = zip(*(table[name].to_pylist() for name in names), strict=True)
    return [
        PairRow(prompt, problem or PairExample(better, worse, margin, grade, own_source or source, *rest), losses)
        for better, worse, (prompt, problem, losses, margin, grade, own_source, *rest) in zip(
            chosen, rejected, columns, strict=True
        )
    ]


def _id_views(column: pa.ChunkedArray) -> list[Any]:
    """The ids of each row, as views of one array."""
    views = []
    for chunk in column.chunks:
        flat, ends = chunk.values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy()
        views += [flat[start:end] for start, end in pairwise(ends)]
    return views
