"""Part ``reward_training``: speed and memory of reward training against TRL's RewardTrainer, on real preference pairs.

Invariants: all sides start from the same weights, run the same pairs in batches of eight, and have two threads each. They
run in short turns, one after the other. The losses of the first update agree before a ratio counts. TRL runs in an
environment of its own.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.figures import Figure, Figures
from benchmarks.peers.line_process import LineProcess
from benchmarks.peers.reward_training_rank import PAIRS_PER_UPDATE, Rank
from benchmarks.sequences import LONGEST, REAL_PAIRS, ragged_sequences, real_sequences
from benchmarks.service.reward_service import VOCABULARY, save_model
from rlhf_ray.console import progress
from rlhf_ray.data.batches import make_pair_batch
from rlhf_ray.data.encoded_pairs import PairExample
from rlhf_ray.environment import for_process
from rlhf_ray.network import LOOPBACK
from rlhf_ray.planning.flops import ComputeShape, training_flops
from rlhf_ray.trajectories import pack
from tests.parity import environment

RANKS = THREADS = 2
EVERY = 16
"""Only one batch in this many is run, so that an epoch takes seconds. TRL groups all pairs by length before."""
EPOCHS, UPDATES_PER_TURN = 3, 3
AGREES_TO = 0.02
"""The largest difference between the losses of the first update, near log 2, that bf16 explains."""
Pair = list[list[int]]


def measure(quick: bool = False) -> Figures:
    """Speed and memory against TRL, the gain of shared prefixes, and the share of the machine's rate of matrix products."""
    with TemporaryDirectory() as name:
        return _alone(Path(name)) if quick else _against_trl(Path(name))


@dataclass
class Seconds:
    """The seconds of each side in each turn, and the FLOP/s of matrix products measured in between."""

    ours: list[float] = field(default_factory=list)
    unshared: list[float] = field(default_factory=list)
    arrival: list[float] = field(default_factory=list)
    grouped: list[float] = field(default_factory=list)
    matmul_rate: list[float] = field(default_factory=list)


def _against_trl(directory: Path) -> Figures:
    if not REAL_PAIRS.is_file():
        raise FileNotFoundError(f"{REAL_PAIRS} is not there: speed against TRL is measured on real pairs")
    model = save_model(directory / "model", "llama-14m")
    everything = _pairs(real_sequences(1 << 20, VOCABULARY))
    with ExitStack() as stack:
        grouped, rows = _trl(stack, model, everything, "group_by_length", every=EVERY)
        pairs = [everything[row] for row in sorted(rows)]
        arrival, _ = _trl(stack, model, pairs, "sequential", every=1)
        ranks, shape = _ranks(stack, model, pairs)
        seconds = _turns(ranks, arrival, grouped, len(pairs) // PAIRS_PER_UPDATE)
        theirs, ours = arrival.peak / 1e6, sum(rank.peak for rank in ranks) / 1e6
    return _ratios(seconds, pairs, shape) | _memory(theirs, ours)


def _trl(
    stack: ExitStack, model: Path, pairs: Sequence[Pair], strategy: str, *, every: int
) -> tuple[LineProcess, list[int]]:
    """Start TRL; returns it, ready for its first update, and the indices of the pairs that its epoch runs."""
    kept = {name: os.environ[name] for name in environment.KEPT if name in os.environ}
    command = [environment.python(), Path(__file__).parent / "peers" / "reward_training_trl.py"]
    peer = stack.enter_context(LineProcess(command, kept | for_process(threads=THREADS)))
    peer.send(
        model=str(model), directory=str(model.parent / strategy), pairs=pairs, strategy=strategy, every=every,
        turn=UPDATES_PER_TURN, epochs=EPOCHS + 1, longest=LONGEST,
    )  # fmt: skip
    return peer, peer.receive()["rows"]


def _ranks(stack: ExitStack, model: Path, pairs: Sequence[Pair]) -> tuple[list[LineProcess], ComputeShape]:
    """Start this project's ranks; returns them, ready, and what decides the FLOPs of a token."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.peers.reward_training_rank"]
    ranks = [stack.enter_context(LineProcess(command, {**os.environ, **for_process()})) for _ in range(RANKS)]
    for number, rank in enumerate(ranks):
        rank.send(rank=number, ranks=RANKS, model=str(model), pairs=pairs, port=port)
    shapes = [ComputeShape(**rank.receive()["shape"]) for rank in ranks]
    return ranks, shapes[0]


def _turns(ranks: Sequence[LineProcess], arrival: LineProcess, grouped: LineProcess, updates: int) -> Seconds:
    """Run all epochs in short turns of all sides, after one turn of each that is compared and not timed."""
    _require_agreement(_ours(ranks, 0, share=True)["losses"][0], _theirs(arrival)["losses"][0])
    _ours(ranks, 0, share=False)
    _theirs(grouped)
    seconds = Seconds()
    for update in progress([*range(0, updates, UPDATES_PER_TURN)] * EPOCHS, "turns"):
        seconds.ours.append(_ours(ranks, update, share=True)["seconds"])
        seconds.arrival.append(_theirs(arrival)["seconds"])
        seconds.matmul_rate.append(_matmul_rate(ranks))
        seconds.grouped.append(_theirs(grouped)["seconds"])
        seconds.unshared.append(_ours(ranks, update, share=False)["seconds"])
    return seconds


def _ours(ranks: Sequence[LineProcess], first: int, *, share: bool) -> dict[str, Any]:
    for rank in ranks:
        rank.send(first=first, updates=UPDATES_PER_TURN, share=share)
    answers = [rank.receive() for rank in ranks]
    losses = [sum(parts) for parts in zip(*(answer["losses"] for answer in answers), strict=True)]
    return {"seconds": max(answer["seconds"] for answer in answers), "losses": losses}


def _theirs(peer: LineProcess) -> dict[str, Any]:
    peer.send(updates=UPDATES_PER_TURN)
    return peer.receive()


def _matmul_rate(ranks: Sequence[LineProcess]) -> float:
    """The FLOP/s of matrix products of all ranks together, measured at the same time."""
    for rank in ranks:
        rank.send(matmul_rate=True)
    return sum(float(rank.receive()["rate"]) for rank in ranks)


def _require_agreement(ours: float, theirs: float) -> None:
    """Compare the losses of the first update. Later ones differ: bf16 weights lose more than those with fp32 masters."""
    if not abs(ours - theirs) < AGREES_TO:
        raise AssertionError(
            f"the loss of the first update is {ours:.4f} here and {theirs:.4f} there: nothing to compare"
        )


def _ratios(seconds: Seconds, pairs: Sequence[Pair], shape: ComputeShape) -> Figures:
    ours = _epochs(seconds.ours)
    conditions = (
        f"llama-14m, {len(pairs)} real pairs of at most {LONGEST} tokens a side, {PAIRS_PER_UPDATE} an update, bf16; here with "
        f"fp32 masters on {RANKS} ranks of one thread, {len(pairs) / median(ours):.1f} pairs/s; in turns of "
        f"{UPDATES_PER_TURN} updates, median of {EPOCHS} epochs"
    )
    trl = f"seconds of TRL 1.16's RewardTrainer, bf16 weights, {THREADS} threads, {{}}, over ours; {conditions}"
    gain = f"seconds without shared prefixes over those with them; {conditions}"
    share = (
        f"FLOP/s of what is computed, shared prefixes once, over those of large bf16 products in between; {conditions}"
    )
    rate = sum(_computed(pair, shape) for pair in pairs) / median(ours)
    return {
        "reward_training.pairs_per_second_vs_trl": Figure(
            _ratio(_epochs(seconds.arrival), ours), "x", True, trl.format("in arrival order")
        ),
        "reward_training.pairs_per_second_vs_trl_grouped": Figure(
            _ratio(_epochs(seconds.grouped), ours), "x", True, trl.format("grouped by length")
        ),
        "reward_training.prefix_sharing_gain": Figure(_ratio(_epochs(seconds.unshared), ours), "x", True, gain),
        "reward_training.share_of_matmul_roof": Figure(rate / median(seconds.matmul_rate), "", True, share),
    }


def _memory(theirs: float, ours: float) -> Figures:
    conditions = (
        f"peak anonymous memory above the imported process: {theirs:.0f} MB of TRL in arrival order over {ours:.0f} MB of "
        f"all {RANKS} ranks, each with weights, gradients and fp32 masters of its own"
    )
    return {"reward_training.memory_vs_trl": Figure(theirs / ours, "x", True, conditions)}


def _epochs(turns: Sequence[float]) -> list[float]:
    """The seconds of each epoch; a single turn cannot be compared, since different sides run different pairs in it."""
    size = len(turns) // EPOCHS
    return [sum(turns[start : start + size]) for start in range(0, len(turns), size)]


def _ratio(theirs: Sequence[float], ours: Sequence[float]) -> float:
    return median(one / other for one, other in zip(theirs, ours, strict=True))


def _computed(pair: Pair, shape: ComputeShape) -> float:
    """The FLOPs of a pair, with the shared prefix counted once."""
    batch = make_pair_batch([PairExample(pair[0], pair[1])])
    shared = batch.num_tokens - pack(batch).num_tokens
    return training_flops(shape, batch.lengths.tolist()) - training_flops(shape, [shared])


def _pairs(sequences: Sequence[Any]) -> list[Pair]:
    sides = [sequence.tolist() for sequence in sequences]
    return [list(pair) for pair in zip(sides[0::2], sides[1::2], strict=True)]


def _alone(directory: Path) -> Figures:
    """For ``--quick``: our side alone, in this process, over random pairs with a common prefix."""
    model = save_model(directory / "model", "llama-tiny")
    sides = [sequence.tolist() for sequence in ragged_sequences(2 * PAIRS_PER_UPDATE, VOCABULARY, longest=32)]
    pairs = [[sides[0] * 2 + side for side in pair] for pair in zip(sides[0::2], sides[1::2], strict=True)]
    rank = Rank(0, 1, str(model), [PairExample(pair[0], pair[1]) for pair in pairs], None)
    shared, whole = (rank.turn(0, 1, share=share) for share in (True, False))
    rate = sum(_computed(pair, rank.worker.compute_shape()) for pair in pairs) / shared["seconds"]
    conditions = f"llama-tiny, one update of {PAIRS_PER_UPDATE} random pairs in this process"
    return {
        "reward_training.prefix_sharing_gain": Figure(whole["seconds"] / shared["seconds"], "x", True, conditions),
        "reward_training.share_of_matmul_roof": Figure(rate / rank.worker.matmul_rate(), "", True, conditions),
    }
