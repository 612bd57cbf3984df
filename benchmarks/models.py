"""Part ``models``: speed of a reward model on packs, against the same model of transformers on padded batches.

Invariants: both sides have the same weights and one CPU thread. Their scores agree before anything is timed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from benchmarks.figures import Figure, Figures
from benchmarks.sequences import LONGEST, REAL_PAIRS, padded_batches, ragged_sequences, real_sequences
from rlhf_ray.models import PackedRegression
from rlhf_ray.models.regression_loading import make_head, wrap_backbone
from rlhf_ray.models.weights.tiny_llama import make_config
from rlhf_ray.trajectories import Packed, TrajectoryBatch, make_schedule, pack

VOCABULARY = 4096
ROWS = 16
REPEATS = 3
AGREES_TO = 0.1
"""Largest difference of scores that bf16 explains, as a share of their spread."""


@dataclass(frozen=True)
class Contest:
    """The same model and sequences on both sides."""

    packed: PackedRegression
    packs: list[Packed]
    whole: list[Packed]
    """The same packs without shared prefixes."""
    padded: PreTrainedModel
    origin: str
    """Where the sequences come from: random ones, or real pairs, whose sides lie in one pack and share their prompt."""
    batches: list[tuple[Tensor, Tensor]]
    order: list[int]
    """The index of the sequence that each score of the packs belongs to."""

    def score_packed(self, packs: list[Packed]) -> Tensor:
        return torch.cat([self.packed(part, "scores") for part in packs])

    def score_padded(self) -> Tensor:
        return torch.cat([self._padded_scores(ids, mask) for ids, mask in self.batches])

    def train_packed(self, packs: list[Packed]) -> None:
        for part in packs:
            self.packed(part, "scores").sum().backward()

    def train_padded(self) -> None:
        for ids, mask in self.batches:
            self._padded_scores(ids, mask).sum().backward()

    def _padded_scores(self, ids: Tensor, mask: Tensor) -> Tensor:
        scores: Tensor = self.padded(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()[:, 0]
        return scores


def measure(quick: bool = False) -> Figures:
    """Throughput of the packed side as a multiple of the padded one's, training and scoring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        contest = _contest("llama-tiny", 32, 24) if quick else _contest("llama-14m", 128, 512)
        _require_agreement(contest)
        figures: Figures = {}
        for packs, suffix, sharing in (
            (contest.packs, "", "what neighbours begin with in common computed once"),
            (contest.whole, "_unshared", "nothing shared"),
        ):
            with torch.no_grad():
                scoring = _ratio(partial(contest.score_packed, packs), contest.score_padded)
            training = _ratio(partial(contest.train_packed, packs), contest.train_padded)
            method = f"{_method(contest)}, {sharing}"
            figures |= {
                f"models.packed_vs_padded_training{suffix}": Figure(
                    training, "x", True, f"{method}; forward and backward"
                ),
                f"models.packed_vs_padded_scoring{suffix}": Figure(scoring, "x", True, f"{method}; forward"),
            }
    finally:
        torch.set_num_threads(before)
    return figures


def _method(contest: Contest) -> str:
    sequences, tokens = len(contest.order), sum(int(mask.sum()) for _, mask in contest.batches)
    return (
        f"{sequences} {contest.origin} sequences, {tokens} tokens, {contest.padded.config.hidden_size} wide, bf16, one "
        f"thread: CPU seconds of transformers with SDPA on padded batches of {ROWS} in arrival order over those of this "
        f"project on packs, median of {REPEATS} alternating pairs"
    )


def _contest(shape: str, count: int, longest: int) -> Contest:
    config = make_config(shape, VOCABULARY, pad_token_id=0)
    config.num_labels = 1
    torch.manual_seed(0)
    padded = AutoModelForSequenceClassification.from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    backbone = copy.deepcopy(padded.base_model)
    head = make_head(backbone, "inv_sqrt", 0)
    padded.score.weight.data.copy_(head.weight)
    model = wrap_backbone(
        backbone, head, "reward", attention="auto", strict_attention=True, head_origin="fresh, as on the padded side"
    )
    real = longest == LONGEST and REAL_PAIRS.is_file()
    sequences = (real_sequences if real else ragged_sequences)(count, VOCABULARY, longest=longest)
    batch = TrajectoryBatch.from_sequences(sequences)
    micro_batches = make_schedule(batch.lengths.tolist(), ranks=1, max_tokens=8 * longest, unit=2 if real else 1).rank(
        0
    )
    packs = [pack(batch, indices) for indices in micro_batches]
    return Contest(
        PackedRegression(model).train(),
        packs,
        [pack(batch, indices, share_prefixes=False) for indices in micro_batches],
        padded.train(),
        "real paired" if real else "random",
        padded_batches(sequences, ROWS),
        [index for indices in micro_batches for index in indices],
    )


def _require_agreement(contest: Contest) -> None:
    with torch.no_grad():
        theirs = contest.score_padded()[contest.order]
        for packs in (contest.packs, contest.whole):
            difference = float((contest.score_packed(packs) - theirs).abs().max() / theirs.std())
            if not difference < AGREES_TO:
                raise AssertionError(
                    f"packed and padded scores differ by {difference:.3g} of their spread: nothing to compare"
                )


def _ratio(ours: Callable[[], object], theirs: Callable[[], object]) -> float:
    """CPU seconds of ``theirs`` over those of ``ours``: other processes on the machine count for neither."""
    ours()
    theirs()
    return median(_seconds(theirs) / _seconds(ours) for _ in range(REPEATS))


def _seconds(work: Callable[[], object]) -> float:
    started_at = time.process_time()
    work()
    return time.process_time() - started_at
