"""The peers in part ``scoring``: transformers on padded batches and vLLM's pooling runner, against the offline scorer.

Invariants: all sides have the same weights in bf16 and score the same items with the same number of threads, in turns.
Each peer has a process of its own. Either none shares prefixes or all do. Scores agree before a ratio counts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median, pstdev
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.figures import Figure, Figures
from benchmarks.peers.scoring_peer import ScoringPeer
from benchmarks.sequences import REAL_PAIRS, ragged_sequences
from benchmarks.service.reward_service import VOCABULARY, load_group, role_of, save_model
from benchmarks.whole_packs import nothing_shared
from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.data.tokenizers import make_tokenizer
from rlhf_ray.rewards.request import ScoreRequest
from rlhf_ray.rows.formats import raw_rows

THREADS = 2
ROWS = 16
LONGEST = 1024
AGREES_TO = 0.1
"""The largest mean difference of scores that bf16 explains, as a share of their standard deviation."""


def measure(quick: bool = False) -> Figures:
    """The speed of the offline scorer as a multiple of each peer's."""
    shape, count, repeats = ("llama-tiny", 24, 1) if quick else ("llama-14m", 256, 5)
    before = torch.get_num_threads()
    try:
        with TemporaryDirectory() as name:
            directory = save_model(Path(name) / "model", shape)
            contest = _Contest(directory, *_sequences(count), shape, repeats)
            figures = contest.against_padded()
            if not quick:
                figures |= contest.against_pooling(shared=False) | contest.against_pooling(shared=True)
            return figures
    finally:
        torch.set_num_threads(before)


@dataclass(frozen=True)
class _Contest:
    """The model and the items that all sides score."""

    directory: Path
    sequences: list[list[int]]
    source: str
    shape: str
    repeats: int

    @cached_property
    def group(self) -> RewardGroup:
        return load_group(role_of(self.directory, threads=THREADS), max_batch_tokens=8192)

    def against_padded(self) -> Figures:
        with self._peer("benchmarks.peers.padded", rows=ROWS) as peer:
            ratio = self._ratio(peer.score, "transformers", shared=False)
        method = f"seconds of transformers on padded batches of {ROWS} as they come over ours; {self._conditions(shared=False)}"
        return {"scoring.offline_vs_padded": Figure(ratio, "x", True, method)}

    def against_pooling(self, *, shared: bool) -> Figures:
        with self._peer("benchmarks.peers.pooling", shared=shared) as peer:
            ratio = self._ratio(peer.score, "vLLM's pooling runner", shared=shared)
        name = f"scoring.offline_vs_vllm_pooling{'_shared' if shared else ''}"
        method = f"seconds of vLLM's pooling runner over ours; {self._conditions(shared=shared)}"
        return {name: Figure(ratio, "x", True, method)}

    def _peer(self, program: str, **order: Any) -> ScoringPeer:
        return ScoringPeer(program, self.directory, self.sequences, threads=THREADS, **order)

    def _ratio(self, theirs: Callable[[], tuple[float, list[float]]], peer: str, *, shared: bool) -> float:
        """The peer's seconds over ours, after one turn of each whose scores must agree."""
        with nullcontext() if shared else nothing_shared():
            _agree(_ours(self.group, self.sequences)[1], theirs()[1], peer)
            turns = [(_ours(self.group, self.sequences)[0], theirs()[0]) for _ in range(self.repeats)]
        return median(other / one for one, other in turns)

    def _conditions(self, *, shared: bool) -> str:
        sharing = "prefixes shared by both sides, from nothing in each turn" if shared else "no shared prefixes"
        items = f"{len(self.sequences)} {self.source}"
        return f"{self.shape}, bf16, {items}, {THREADS} threads, {sharing}; median of {self.repeats} turns"


def _ours(group: RewardGroup, sequences: list[list[int]]) -> tuple[float, list[float]]:
    requests = [ScoreRequest(token_ids=tuple(sequence)) for sequence in sequences]
    started_at = time.monotonic()
    results = group.score(requests).result()
    return time.monotonic() - started_at, [float(result.raw) for result in results if result.raw is not None]


def _sequences(count: int) -> tuple[list[list[int]], str]:
    """Token ids, and what they are: sides of real pairs if their file is there, else random items of similar lengths."""
    if not REAL_PAIRS.exists():
        return [sequence.tolist() for sequence in ragged_sequences(count, VOCABULARY)], "random items"
    tokenizer = make_tokenizer(REAL_PAIRS, VOCABULARY)
    rows = [row for _, row in raw_rows(REAL_PAIRS)]
    random.Random(0).shuffle(rows)
    texts = [row[side] for row in rows[: count // 2] for side in ("chosen", "rejected")]
    random.Random(1).shuffle(texts)
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [ids[-LONGEST:] for ids in encoded], "sides of real pairs, shuffled"


def _agree(ours: list[float], theirs: list[float], peer: str) -> None:
    off = sum(abs(one - other) for one, other in zip(ours, theirs, strict=True)) / len(ours) / pstdev(ours)
    if not off < AGREES_TO:
        raise AssertionError(f"our scores and those of {peer} differ by {off:.3g} of their spread: nothing to compare")
