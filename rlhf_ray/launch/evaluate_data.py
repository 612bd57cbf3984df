"""``rlhf-ray evaluate --data-only``: measure a file of preferences without a reward model.

Invariants: rows are read by the reader that training uses, one after the other; neither Ray nor a model is loaded, and torch
only where a tokenizer is; no text of a pair is printed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from rlhf_ray.config.files.models import model_config_file
from rlhf_ray.config.files.reward_record import read_reward_record
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.console import progress, say, table
from rlhf_ray.data.chat import ChatFormat
from rlhf_ray.data.encode import EQUAL, TOO_LONG, EncodedPair, encode_in_parts, encode_pair_part, without_refused_pairs
from rlhf_ray.errors import EXIT_DONE, DataError, RequestError
from rlhf_ray.evaluation.pair_census import PLACES_SHOWN, PairCensus, text_length
from rlhf_ray.rows.preferences import PreferencePair, PreferenceReader
from rlhf_ray.rows.read import read_file, report_bad_rows
from rlhf_ray.rows.sources import RowSource
from rlhf_ray.storage import OutputFile

PAIRS_AT_ONCE = 4096
"""Pairs whose texts are in memory at once; enough for all threads to tokenize."""
NO_LIMIT = 2**31
Figures = Mapping[str, float]
Measured = tuple[PreferencePair, tuple[int, int, int] | None, str, Sequence[str]]
"""A pair; the lengths of prompt, chosen and rejected answer, where they are known; why training would drop it, if it would;
what the chat template leaves out of it."""


@dataclass(frozen=True)
class DataReport:
    """What a file of preferences holds."""

    figures: Figures
    """Counts, length bias and label noise over all pairs; ``docs/reward_training.md`` explains each."""
    intervals: Mapping[str, tuple[float, float]]
    """The intervals of 95 % of the figures that have one."""
    sources: Mapping[str, Figures]
    """Pairs, length bias and mean lengths of each source."""
    lengths: Mapping[str, Figures]
    """Mean, median, 95 % quantile and maximum of prompts and answers, in ``unit``."""
    unit: str
    """``tokens`` where a tokenizer was given, else ``characters``."""
    dropped: Mapping[str, int]
    """How many pairs training would drop, by reason, as far as it is known without a tokenizer."""
    left_out_by_template: Mapping[str, int]
    """In how many pairs the chat template leaves something out, by what it is; empty without a tokenizer."""
    shared: Figures
    """Prompts of the held-out file that the file shares; empty without one."""
    places: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Where rows stand that should be looked at, a few of each kind."""


@dataclass(frozen=True)
class DataRequest:
    """What is measured: a file, the file held out beside it, and how both are read."""

    data: Path
    held_out: Path | None = None
    reader: PreferenceReader = PreferenceReader()  # noqa: RUF009 (it is frozen)
    tokenizer_from: str | None = None
    """A model whose tokenizer and chat template count tokens; none: characters are counted."""
    max_tokens: int = 4096
    """Longer pairs are counted as dropped, where tokens are counted."""


def evaluate_data(request: DataRequest, *, output: OutputFile | None, allow_shared_prompts: bool) -> int:
    """Print what :func:`measure_data` finds as tables, and write all of it to ``output``.

    Raises :class:`DataError` at the end where the held-out file shares prompts with the other one, unless that is allowed.
    """
    if output is not None:
        output.check()
    if allow_shared_prompts and request.held_out is None:
        raise RequestError("--allow-shared-prompts needs a file whose prompts could be shared: add --held-out")
    report = measure_data(request)
    print_data_report(report)
    if output is not None:
        output.write(json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n")
    shared = int(report.shared.get("shared_prompts", 0) + report.shared.get("nearly_shared_prompts", 0))
    if shared and not allow_shared_prompts:
        raise DataError(
            f"{request.held_out}: {shared} of its prompts are also in {request.data}, so figures on it would be too good: take "
            "them out of one of the files, or allow them with --allow-shared-prompts"
        )
    return EXIT_DONE


def longest_pair(settings: Sequence[str], *, has_tokenizer: bool) -> int:
    """``max_tokens`` of the command's ``settings``; any other is refused by its name, since nothing would read it."""
    limit = DataRequest.max_tokens
    for setting in settings:
        key, _, written = setting.partition("=")
        if key.strip() != "max_tokens":
            raise RequestError(
                f"{key}: --data-only loads no model: leave it out; max_tokens is the only setting it reads"
            )
        if not has_tokenizer:
            raise RequestError(f"{setting}: tokens are counted by the tokenizer of a model: name one, or leave it out")
        if not written.strip().isdecimal() or int(written) < 1:
            raise RequestError(f"max_tokens: {written!r} is not a whole number above 0")
        limit = int(written)
    return limit


def measure_data(request: DataRequest) -> DataReport:
    """Read the pairs of ``request`` and measure them."""
    chat = None if request.tokenizer_from is None else _load_chat(request.tokenizer_from)
    census, dropped, left_out, bad_rows = _count(request.data, request, chat)
    shared: Figures = {}
    if request.held_out is not None:
        shared = census.shared_prompts(_count(request.held_out, request, None).census)
    figures, intervals = census.figures()
    return DataReport(
        {**figures, "bad_rows": float(len(bad_rows))},
        intervals,
        census.by_source(),
        census.lengths(),
        "characters" if chat is None else "tokens",
        dict(dropped),
        dict(left_out),
        shared,
        {"bad_rows": bad_rows[:PLACES_SHOWN], **census.places()},
    )


class _Count(NamedTuple):
    """What was found in one file."""

    census: PairCensus
    dropped: Counter[str]
    """Pairs that training would drop, by reason."""
    left_out: Counter[str]
    """Pairs of which the chat template leaves something out, by what it is."""
    bad_rows: list[str]
    """Rows that cannot be read, each with its place and what is wrong."""


def _count(path: Path, request: DataRequest, chat: ChatFormat | None) -> _Count:
    """Read one file to its end."""
    if not path.exists():
        raise DataError(f"{path} does not exist: name a file of preference pairs")
    source, bad_rows = RowSource(str(path)), list[str]()
    pairs = progress(read_file(source, request.reader, bad_rows=bad_rows), f"{path}: pairs read")
    count = _Count(PairCensus(), Counter(), Counter(), bad_rows)
    for pair, lengths, reason, losses in (
        _with_characters(pairs) if chat is None else _with_tokens(pairs, chat, request, bad_rows)
    ):
        count.census.add(pair, lengths)
        count.dropped.update([reason] if reason else [])
        count.left_out.update(losses)
    report_bad_rows(source, bad_rows)
    return count


def _with_characters(pairs: Iterator[PreferencePair]) -> Iterator[Measured]:
    """Each pair with its lengths in characters."""
    for pair in pairs:
        reason = EQUAL if pair.chosen == pair.rejected else ""
        yield pair, (text_length(pair.prompt), text_length(pair.chosen), text_length(pair.rejected)), reason, ()


def _with_tokens(
    pairs: Iterator[PreferencePair], chat: ChatFormat, request: DataRequest, bad_rows: list[str]
) -> Iterator[Measured]:
    """Each pair with its lengths in tokens; pairs that the chat template refuses are bad rows too."""

    def encode(part: Sequence[PreferencePair]) -> list[EncodedPair | str]:
        return encode_pair_part(chat, part, NO_LIMIT)

    while part := list(islice(pairs, PAIRS_AT_ONCE)):
        if request.reader.drops_bad_rows:
            part = without_refused_pairs(chat, part, bad_rows)
        for pair, encoded in zip(part, chain.from_iterable(encode_in_parts(part, "pairs", encode)), strict=True):
            if isinstance(encoded, str):
                yield pair, None, encoded, ()
                continue
            chosen, rejected, prompt = len(encoded.chosen), len(encoded.rejected), encoded.prompt_length
            reason = TOO_LONG if max(chosen, rejected) > request.max_tokens else ""
            yield pair, (prompt, chosen - prompt, rejected - prompt), reason, encoded.losses or ()


def _load_chat(path: str) -> ChatFormat:
    """The tokenizer of a model, with the template variables that a reward model remembers."""
    from rlhf_ray.models import load_tokenizer

    model = ModelConfig(path=path)
    record = read_reward_record(model_config_file(model), f"{path}/config.json")
    return ChatFormat(load_tokenizer(model), {} if record is None else record.template_variables)


def print_data_report(report: DataReport) -> None:
    """Print the figures of all pairs, of each source and of lengths, and where to look."""
    figures = {**report.figures, **report.shared}
    lines = [(name, f"{_written(value)}{_interval(report, name)}") for name, value in figures.items()]
    say(table("all pairs (with intervals of 95 %)", ("figure", "value"), lines))
    names = list(dict.fromkeys(name for row in report.sources.values() for name in row))
    headers = ("source", *(name.replace("_", " ") for name in names))
    say(table("by source", headers, [[source or "-", *_cells(row, names)] for source, row in report.sources.items()]))
    columns = ("mean", "median", "quantile_95", "largest")
    lengths = [[name, *_cells(row, columns)] for name, row in report.lengths.items()]
    say(table(f"lengths in {report.unit}", ("", *columns), lengths))
    if report.dropped:
        say(table("dropped by training", ("reason", "pairs"), report.dropped.items()))
    if report.left_out_by_template:
        say(table("left out by the chat template", ("what", "pairs"), report.left_out_by_template.items()))
    for kind, places in report.places.items():
        if places:
            say(f"{kind}: {'; '.join(places)}")


def _written(value: float) -> str:
    return f"{value:.0f}" if value.is_integer() else f"{value:.4g}"


def _interval(report: DataReport, name: str) -> str:
    if name not in report.intervals:
        return ""
    low, high = report.intervals[name]
    return f" ({low:.4g} to {high:.4g})"


def _cells(row: Figures, names: Sequence[str]) -> list[str]:
    return [_written(row[name]) if name in row else "" for name in names]
