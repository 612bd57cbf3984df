"""The quality of preference pairs without a model: repeated and contradicting pairs, shared prompts, length, label noise.

Invariants: pairs are taken one by one and none of their texts is kept, only hashes, lengths and places; a figure that is
undefined is left out, never 0; ties count in no figure about labels; no figure depends on the order of the rows.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_ray.evaluation.intervals import wilson_interval
from rlhf_ray.evaluation.label_noise import LabelNoise, estimate_label_noise
from rlhf_ray.rows.preferences import PreferencePair
from rlhf_ray.rows.same_prompt import hash_prompt

Figures = dict[str, float]
Interval = tuple[float, float]
PLACES_SHOWN = 20
"""How many places of rows of one kind are kept, to be shown."""


@dataclass
class _Labels:
    """The rows of one pair of answers to one prompt; its sides in the order of their hashes."""

    first: str
    """Where its first row stands."""
    for_one: int = 0
    for_other: int = 0
    other: str = ""
    """Where the first row stands that contradicts the first one."""


@dataclass
class _SourceCounts:
    """Counts and lengths of the pairs of one source."""

    pairs: int = 0
    ties: int = 0
    prompt: list[int] = field(default_factory=list)
    chosen: list[int] = field(default_factory=list)
    rejected: list[int] = field(default_factory=list)
    decided: list[bool] = field(default_factory=list)


class PairCensus:
    """Counts what a stream of pairs holds."""

    def __init__(self) -> None:
        self.equal_sides = 0
        self.equal_places: list[str] = []
        self._labels: dict[bytes, _Labels] = {}
        self._rows: Counter[bytes] = Counter()
        self._duplicates: list[tuple[str, str]] = []
        self._prompts: dict[str, str] = {}
        self._sources: dict[str, _SourceCounts] = {}

    def add(self, pair: PreferencePair, lengths: tuple[int, int, int] | None) -> None:
        """Take one pair; ``lengths`` are those of prompt, chosen and rejected answer, in one unit, or None if unknown."""
        exact, near = (hash_prompt(pair.prompt, pair.tools, nearly=nearly) for nearly in (False, True))
        self._prompts[exact] = near
        source = self._sources.setdefault(pair.source, _SourceCounts())
        source.pairs += 1
        chosen, rejected = _hash_side(pair.chosen), _hash_side(pair.rejected)
        if chosen == rejected:
            self.equal_sides += 1
            if len(self.equal_places) < PLACES_SHOWN:
                self.equal_places.append(pair.where)
            return
        is_tie = pair.grade == 0
        source.ties += is_tie
        if lengths is not None:
            for series, length in zip((source.prompt, source.chosen, source.rejected), lengths, strict=True):
                series.append(length)
            source.decided.append(not is_tie)
        self._add_label(bytes.fromhex(exact), chosen, rejected, pair.where, is_tie=is_tie)

    def _add_label(self, prompt: bytes, chosen: bytes, rejected: bytes, where: str, *, is_tie: bool) -> None:
        one, other = sorted((chosen, rejected))
        key = hashlib.blake2b(prompt + one + other, digest_size=16).digest()
        labels = self._labels.setdefault(key, _Labels(where))
        row = key + (b"tie" if is_tie else b"one" if chosen == one else b"other")
        self._rows[row] += 1
        if self._rows[row] > 1 and len(self._duplicates) < PLACES_SHOWN:
            self._duplicates.append((labels.first, where))
        if is_tie:
            return
        if chosen == one:
            labels.for_one += 1
        else:
            labels.for_other += 1
        if labels.for_one and labels.for_other and not labels.other:
            labels.other = where

    @property
    def pairs(self) -> int:
        """How many pairs were taken."""
        return sum(source.pairs for source in self._sources.values())

    def figures(self) -> tuple[Figures, dict[str, Interval]]:
        """Return all figures by name, and the intervals of 95 % of those that have one."""
        contradicting = [labels for labels in self._labels.values() if labels.for_one and labels.for_other]
        figures: Figures = {
            "pairs": float(self.pairs),
            "prompts": float(len(self._prompts)),
            "prompts_but_for_writing": float(len(set(self._prompts.values()))),
            "ties": float(sum(source.ties for source in self._sources.values())),
            "equal_sides": float(self.equal_sides),
            "duplicate_rows": float(sum(count - 1 for count in self._rows.values())),
            "contradicting_pairs": float(len(contradicting)),
            "contradicting_rows": float(sum(labels.for_one + labels.for_other for labels in contradicting)),
        }
        bias, intervals = length_bias(list(self._sources.values()))
        figures |= bias
        noise = self.label_noise()
        if noise is not None:
            figures |= {
                "labelled_again": float(noise.pairs),
                "disagreement": noise.disagreement,
                "label_noise": noise.rate,
                "best_possible_accuracy": 1.0 - noise.rate,
            }
            intervals["label_noise"] = noise.interval
        return figures, intervals

    def label_noise(self) -> LabelNoise | None:
        """Return what pairs that were labelled more than once say about wrong labels."""
        return estimate_label_noise((labels.for_one, labels.for_other) for labels in self._labels.values())

    def by_source(self) -> dict[str, Figures]:
        """Return the figures of each source that need its own pairs alone, the largest source first."""
        ordered = sorted(self._sources.items(), key=lambda item: (-item[1].pairs, item[0]))
        return {
            name: {"pairs": float(side.pairs), "ties": float(side.ties), **length_bias([side])[0], **_means(side)}
            for name, side in ordered
        }

    def lengths(self) -> dict[str, Figures]:
        """Return mean, median, 95 % quantile and maximum of the lengths of prompts and answers."""
        series = {
            name: [length for side in self._sources.values() for length in getattr(side, name)]
            for name in ("prompt", "chosen", "rejected")
        }
        return {name: _spread(values) for name, values in series.items() if values}

    def shared_prompts(self, held_out: PairCensus) -> Figures:
        """Return how many prompts and rows of ``held_out`` have a prompt of these pairs, exactly or nearly."""
        near_here = set(self._prompts.values())
        exact = [prompt for prompt in held_out._prompts if prompt in self._prompts]
        near = [prompt for prompt, written in held_out._prompts.items() if written in near_here]
        return {
            "held_out_pairs": float(held_out.pairs),
            "held_out_prompts": float(len(held_out._prompts)),
            "shared_prompts": float(len(exact)),
            "nearly_shared_prompts": float(len(near) - len(exact)),
        }

    def places(self) -> dict[str, list[str]]:
        """Return where rows stand that should be looked at, a few of each kind."""
        contradictions = [f"{labels.first} and {labels.other}" for labels in self._labels.values() if labels.other]
        return {
            "contradicting": contradictions[:PLACES_SHOWN],
            "duplicate": [f"{first} and {again}" for first, again in self._duplicates],
            "equal_sides": self.equal_places,
        }


def length_bias(sources: Sequence[_SourceCounts]) -> tuple[Figures, dict[str, Interval]]:
    """Return how far the longer answer is the chosen one.

    ``longer_chosen`` is the share of it among pairs whose answers differ in length, ``longer_wins_accuracy`` the accuracy of
    the rule that the longer answer wins, where equal lengths count one half, and ``length_correlation`` that of the label
    with the difference in length, each pair seen from both sides: ``mean(d) / sqrt(mean(d^2))``.
    """
    chosen, rejected, decided = (
        np.array([value for source in sources for value in getattr(source, name)])
        for name in ("chosen", "rejected", "decided")
    )
    if not decided.any():
        return {}, {}
    difference = (chosen - rejected)[decided.astype(np.bool_)].astype(np.float64)
    longer, different = int((difference > 0).sum()), int((difference != 0).sum())
    accuracy = (longer + 0.5 * (len(difference) - different)) / len(difference)
    figures: Figures = {"longer_wins_accuracy": accuracy}
    intervals = {"longer_wins_accuracy": wilson_interval(accuracy, len(difference))}
    if different:
        figures["longer_chosen"] = longer / different
        figures["length_correlation"] = float(difference.mean() / np.sqrt((difference**2).mean()))
        intervals["longer_chosen"] = wilson_interval(longer / different, different)
    return figures, intervals


def text_length(value: str | Sequence[Mapping[str, Any]]) -> int:
    """Return the number of characters of a text, or of all texts in messages."""
    if isinstance(value, str):
        return len(value)
    return sum(len(message["content"]) for message in value if isinstance(message.get("content"), str))


def _means(source: _SourceCounts) -> Figures:
    return {
        f"{name}_length": float(np.mean(getattr(source, name)))
        for name in ("prompt", "chosen", "rejected")
        if getattr(source, name)
    }


def _spread(values: Sequence[int]) -> Figures:
    lengths = np.asarray(values)
    return {
        "mean": float(lengths.mean()),
        "median": float(np.median(lengths)),
        "quantile_95": float(np.quantile(lengths, 0.95)),
        "largest": float(lengths.max()),
    }


def _hash_side(side: str | Sequence[Mapping[str, Any]]) -> bytes:
    content = side if isinstance(side, str) else json.dumps(list(side), sort_keys=True)
    return hashlib.blake2b(content.encode("utf-8", "surrogatepass"), digest_size=16).digest()
