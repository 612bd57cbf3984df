"""Of part ``scoring``: the offline scorer against transformers on padded batches and against vLLM's pooling runner.

Always true: all sides hold the same weights in bf16, score the same items with as many threads, without shared prefixes,
in turns; their scores agree before a ratio counts.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from statistics import median, pstdev
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForSequenceClassification

from benchmarks.figures import Figure, Figures
from benchmarks.pooling_peer import PoolingPeer
from benchmarks.reward_service import VOCABULARY, load_group, role_of, save_model
from benchmarks.sequences import padded_batches, ragged_sequences
from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.config.formats import raw_rows
from rlhf_ray.data.tokenizers import make_tokenizer
from rlhf_ray.rewards.request import ScoreRequest

THREADS = 2
ROWS = 16
LONGEST = 1024
REAL_PAIRS = Path(__file__).parents[2] / "shared/data/hh_harmless_pairs.jsonl.gz"
AGREES_TO = 0.1
"""Largest mean difference of scores that bf16 explains, as a share of their spread."""


def measure(quick: bool = False) -> Figures:
    """Items a second as multiples of the peers'."""
    shape, count, repeats = ("llama-tiny", 24, 1) if quick else ("llama-14m", 256, 3)
    before = torch.get_num_threads()
    try:
        with TemporaryDirectory() as name:
            directory = save_model(Path(name) / "model", shape)
            sequences, source = _sequences(count)
            return _measure(directory, shape, sequences, source, repeats, with_vllm=not quick)
    finally:
        torch.set_num_threads(before)


def _measure(
    directory: Path, shape: str, sequences: list[list[int]], source: str, repeats: int, *, with_vllm: bool
) -> Figures:
    group = load_group(role_of(directory, threads=THREADS), max_batch_tokens=8192)
    told = f"{shape}, bf16, {len(sequences)} {source}, {THREADS} threads, no shared prefixes; median of {repeats} turns"
    figures: Figures = {}
    ours, theirs = [], []
    padded = _Padded(directory, sequences)
    _agree(_ours(group, sequences)[1], padded.score()[1], "transformers")
    for _ in range(repeats):
        ours.append(_ours(group, sequences)[0])
        theirs.append(padded.score()[0])
    figures["scoring.offline_vs_padded"] = Figure(
        _ratio(theirs, ours),
        "x",
        True,
        f"seconds of transformers on padded batches of {ROWS} as they come over ours; {told}",
    )
    if with_vllm:
        with PoolingPeer(directory, sequences, threads=THREADS) as peer:
            _agree(_ours(group, sequences)[1], peer.score()[1], "vLLM's pooling runner")
            turns = [(_ours(group, sequences)[0], peer.score()[0]) for _ in range(repeats)]
        figures["scoring.offline_vs_vllm_pooling"] = Figure(
            _ratio([turn[1] for turn in turns], [turn[0] for turn in turns]), "x", True,
            f"seconds of vLLM's pooling runner, prefix cache off, over ours; {told}",
        )  # fmt: skip
    return figures


class _Padded:
    def __init__(self, directory: Path, sequences: list[list[int]]) -> None:
        self._model = AutoModelForSequenceClassification.from_pretrained(directory, dtype=torch.bfloat16).eval()
        self._batches = padded_batches([torch.tensor(sequence) for sequence in sequences], ROWS)

    @torch.inference_mode()
    def score(self) -> tuple[float, list[float]]:
        began = time.monotonic()
        logits = [
            self._model(input_ids=ids, attention_mask=mask, use_cache=False).logits for ids, mask in self._batches
        ]
        return time.monotonic() - began, torch.cat(logits).float()[:, 0].tolist()


def _ours(group: RewardGroup, sequences: list[list[int]]) -> tuple[float, list[float]]:
    requests = [ScoreRequest(token_ids=tuple(sequence)) for sequence in sequences]
    began = time.monotonic()
    results = group.score(requests).result()
    return time.monotonic() - began, [float(result.raw) for result in results if result.raw is not None]


def _sequences(count: int) -> tuple[list[list[int]], str]:
    """Ids of real pairs in the order of their file where it is there, else of made sequences of such lengths."""
    if not REAL_PAIRS.exists():
        return [sequence.tolist() for sequence in ragged_sequences(count, VOCABULARY)], "made items"
    tokenizer = make_tokenizer(REAL_PAIRS, VOCABULARY)
    texts = [row[side] for _, row in raw_rows(REAL_PAIRS) for side in ("chosen", "rejected")]
    random.Random(0).shuffle(texts)
    encoded = tokenizer(texts[:count], add_special_tokens=False)["input_ids"]
    return [ids[-LONGEST:] for ids in encoded], "sides of real pairs"


def _agree(ours: list[float], theirs: list[float], peer: str) -> None:
    off = sum(abs(one - other) for one, other in zip(ours, theirs, strict=True)) / len(ours) / pstdev(ours)
    if not off < AGREES_TO:
        raise AssertionError(f"our scores and those of {peer} differ by {off:.3g} of their spread: nothing to compare")


def _ratio(theirs: list[float], ours: list[float]) -> float:
    return median(other / one for other, one in zip(theirs, ours, strict=True))
