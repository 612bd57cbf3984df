"""``rlhf-ray evaluate --data-only``: measure a file of preferences without a reward model.

Invariants: rows are read by the reader that training uses, one after the other; neither Ray nor a model is loaded, and torch
only where a tokenizer is; no text of a pair is printed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf_ray import storage
from rlhf_ray.config.sections.models import ModelConfig
from rlhf_ray.console import progress, say, table
from rlhf_ray.errors import EXIT_DONE, DataError, RequestError
from rlhf_ray.evaluation.pair_census import PairCensus, text_length
from rlhf_ray.launch.output import require_folder
from rlhf_ray.rows.preferences import PreferencePair, PreferenceReader
from rlhf_ray.rows.read import read_file
from rlhf_ray.rows.sources import RowSource

PAIRS_AT_ONCE = 256
NO_LIMIT = 2**31
Figures = Mapping[str, float]


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


def evaluate_data(request: DataRequest, *, output: Path | None, allow_shared_prompts: bool) -> int:
    """Print what :func:`measure_data` finds as tables, and write all of it to ``output``.

    Raises :class:`DataError` at the end where the held-out file shares prompts with the other one, unless that is allowed.
    """
    require_folder("--output", output)
    if allow_shared_prompts and request.held_out is None:
        raise RequestError("--allow-shared-prompts needs a file whose prompts could be shared: add --held-out")
    report = measure_data(request)
    print_data_report(report)
    if output is not None:
        storage.write_file(output, json.dumps(asdict(report), indent=1, ensure_ascii=False) + "\n")
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
    tokenizer = None if request.tokenizer_from is None else _load_tokenizer(request.tokenizer_from)
    census, dropped = _count(request.data, request, tokenizer)
    shared: Figures = {}
    if request.held_out is not None:
        shared = census.shared_prompts(_count(request.held_out, request, None)[0])
    figures, intervals = census.figures()
    return DataReport(
        figures,
        intervals,
        census.by_source(),
        census.lengths(),
        "characters" if tokenizer is None else "tokens",
        dropped,
        shared,
        census.places(),
    )


def _count(path: Path, request: DataRequest, tokenizer: Any | None) -> tuple[PairCensus, dict[str, int]]:
    """The census of a file, and how many of its pairs would be dropped."""
    if not path.exists():
        raise DataError(f"{path} does not exist: name a file of preference pairs")
    pairs = read_file(RowSource(str(path)), request.reader)
    census, dropped = PairCensus(), Counter[str]()
    if tokenizer is None:
        for pair in progress(pairs, f"{path}: pairs read"):
            census.add(pair, (text_length(pair.prompt), text_length(pair.chosen), text_length(pair.rejected)))
        if census.equal_sides:
            dropped["with two equal sides"] = census.equal_sides
        return census, dict(dropped)
    for pair, lengths, reason in _with_tokens(progress(pairs, f"{path}: pairs read"), tokenizer, request.max_tokens):
        census.add(pair, lengths)
        if reason:
            dropped[reason] += 1
    return census, dict(dropped)


def _with_tokens(
    pairs: Iterator[PreferencePair], tokenizer: Any, max_tokens: int
) -> Iterator[tuple[PreferencePair, tuple[int, int, int] | None, str]]:
    """Each pair with its lengths in tokens, and the reason why training would drop it, if there is one."""
    from rlhf_ray.data.chat import ChatFormat
    from rlhf_ray.data.encode import TOO_LONG, encode_pair_part

    chat = ChatFormat(tokenizer)
    while part := list(islice(pairs, PAIRS_AT_ONCE)):
        for pair, encoded in zip(part, encode_pair_part(chat, part, NO_LIMIT), strict=True):
            if isinstance(encoded, str):
                yield pair, None, encoded
                continue
            chosen, rejected, prompt = len(encoded.chosen), len(encoded.rejected), encoded.prompt_length
            reason = TOO_LONG if max(chosen, rejected) > max_tokens else ""
            yield pair, (prompt, chosen - prompt, rejected - prompt), reason


def _load_tokenizer(path: str) -> Any:
    from rlhf_ray.models import load_tokenizer

    return load_tokenizer(ModelConfig(path=path))


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
