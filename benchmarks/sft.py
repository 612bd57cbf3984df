"""Part ``sft``: speed of supervised fine-tuning against TRL's SFTTrainer, on the chosen answers of real preference pairs.

Invariants: both sides start from the same weights, run the same rows in batches of eight and in the same order, learn the same
tokens, and have two threads. They run in short turns, one after the other. The losses of the first updates agree before a
ratio counts. TRL runs in an environment of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.dpo import (
    EPOCHS,
    RANKS,
    THREADS,
    UPDATES,
    UPDATES_PER_TURN,
    by_epochs,
    pairs_of,
    start_ranks,
    start_trl,
)
from benchmarks.figures import Figure, Figures
from benchmarks.peers.line_process import LineProcess
from benchmarks.peers.sft_rank import ROWS_PER_UPDATE, Rank, as_row
from benchmarks.sequences import LONGEST, REAL_PAIRS, ragged_sequences, real_sequences
from benchmarks.service.reward_service import VOCABULARY, save_policy
from rlhf_ray.console import progress

AGREES_TO = 0.01
"""The largest difference between the losses of the first turn, as a share of TRL's, that bf16 explains."""
Row = list[list[int]]
"""Token ids of a prompt and of its answer."""


def measure(quick: bool = False) -> Figures:
    """Tokens per second against TRL, and what it gains that sequences are packed."""
    with TemporaryDirectory() as name:
        return _alone(Path(name)) if quick else _against_trl(Path(name))


def _against_trl(directory: Path) -> Figures:
    if not REAL_PAIRS.is_file():
        raise FileNotFoundError(f"{REAL_PAIRS} is not there: speed against TRL is measured on real answers")
    model = save_policy(directory / "model", "llama-14m")
    everything = [pair[:2] for pair in pairs_of(real_sequences(1 << 20, VOCABULARY))]
    rows = everything[:: len(everything) // (UPDATES * ROWS_PER_UPDATE)][: UPDATES * ROWS_PER_UPDATE]
    ours, theirs, apart = list[float](), list[float](), list[float]()
    with ExitStack() as stack:
        trl, ranks = start_trl(stack, "sft_trl", model, rows), start_ranks(stack, "sft_rank", model, rows)
        _require_agreement(_ours(ranks, 0)[1], _theirs(trl)[1])
        for update in progress([*range(UPDATES_PER_TURN, UPDATES, UPDATES_PER_TURN)] * EPOCHS, "turns"):
            if update == UPDATES_PER_TURN and ours:  # what the turn before the first epoch was for; TRL's order goes on
                _ours(ranks, 0)
                _theirs(trl)
            ours.append(_ours(ranks, update)[0])
            theirs.append(_theirs(trl)[0])
            apart.append(_ours(ranks, update, packed=False)[0])
    tokens = sum(len(prompt) + len(answer) for prompt, answer in rows[UPDATES_PER_TURN * ROWS_PER_UPDATE :])
    return _figures(by_epochs(ours), by_epochs(theirs), by_epochs(apart), tokens)


def _figures(ours: Sequence[float], theirs: Sequence[float], apart: Sequence[float], tokens: int) -> Figures:
    conditions = (
        f"llama-14m, {tokens} tokens of real demonstrations of at most {LONGEST}, {ROWS_PER_UPDATE} an update, answers "
        f"learned, bf16; here with fp32 masters on {RANKS} ranks of one thread, {tokens / median(ours):.0f} tokens/s; in "
        f"turns of {UPDATES_PER_TURN} updates, median of {EPOCHS} epochs"
    )
    method = (
        f"seconds of TRL 1.16's SFTTrainer, bf16 weights, {THREADS} threads, in arrival order, over ours; {conditions}"
    )
    gain = f"seconds of micro-batches of at most the longest sequence over those of whole packs; {conditions}"
    return {
        "sft.tokens_per_second_vs_trl": Figure(_ratio(theirs, ours), "x", True, method),
        "sft.packing_gain": Figure(_ratio(apart, ours), "x", True, gain),
    }


def _ratio(one: Sequence[float], other: Sequence[float]) -> float:
    return median(left / right for left, right in zip(one, other, strict=True))


def _ours(ranks: Sequence[LineProcess], first: int, *, packed: bool = True) -> tuple[float, float]:
    """Seconds of a turn and its mean loss."""
    for rank in ranks:
        rank.send(first=first, updates=UPDATES_PER_TURN, packed=packed)
    answers = [rank.receive() for rank in ranks]
    losses = [sum(parts) for parts in zip(*(answer["losses"] for answer in answers), strict=True)]
    return max(answer["seconds"] for answer in answers), sum(losses) / len(losses)


def _theirs(peer: LineProcess) -> tuple[float, float]:
    peer.send(updates=UPDATES_PER_TURN)
    answer = peer.receive()
    return answer["seconds"], sum(answer["losses"]) / len(answer["losses"])


def _require_agreement(ours: float, theirs: float) -> None:
    if not abs(ours - theirs) < AGREES_TO * theirs:
        raise AssertionError(f"the first loss is {ours:.4f} here and {theirs:.4f} there: nothing to compare")


def _alone(directory: Path) -> Figures:
    """For ``--quick``: our side alone, in this process, over random rows."""
    model = save_policy(directory / "model", "llama-tiny")
    ids = [sequence.tolist() for sequence in ragged_sequences(ROWS_PER_UPDATE, VOCABULARY, longest=64)]
    rank = Rank(0, 1, str(model), [as_row(each[:1], each[1:]) for each in ids], None)
    packed, apart = (rank.turn(0, 1, packed=packed)["seconds"] for packed in (True, False))
    conditions = f"llama-tiny, one update of {ROWS_PER_UPDATE} random demonstrations in this process"
    return {"sft.packing_gain": Figure(apart / packed, "x", True, conditions)}
