"""Part ``dpo``: speed of DPO against TRL's DPOTrainer, on real preference pairs.

Invariants: both sides start from the same weights, run the same pairs in batches of eight and in the same order, and have two
threads. They run in short turns, one after the other, and each asks for the reference of the pairs of its turn. The losses of
the first updates agree before a ratio counts. TRL runs in an environment of its own.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.figures import Figure, Figures
from benchmarks.peers.dpo_rank import PAIRS_PER_UPDATE, Rank, as_pair
from benchmarks.peers.line_process import LineProcess
from benchmarks.sequences import LONGEST, REAL_PAIRS, ragged_sequences, real_sequences
from benchmarks.service.reward_service import VOCABULARY, save_policy
from rlhf_ray.console import progress
from rlhf_ray.data.answer_ids import shared_length
from rlhf_ray.environment import for_process
from rlhf_ray.network import LOOPBACK
from tests.parity import environment

RANKS = THREADS = 2
UPDATES, EPOCHS, UPDATES_PER_TURN = 48, 3, 3
AGREES_TO = 0.02
"""The largest difference between the losses of the first turn, near log 2, that bf16 explains."""
Pair = list[list[int]]
"""Token ids of a prompt and of both answers."""


def measure(quick: bool = False) -> Figures:
    """Pairs per second against TRL, and the share of the time that the reference takes."""
    with TemporaryDirectory() as name:
        return _alone(Path(name)) if quick else _against_trl(Path(name))


def _against_trl(directory: Path) -> Figures:
    if not REAL_PAIRS.is_file():
        raise FileNotFoundError(f"{REAL_PAIRS} is not there: speed against TRL is measured on real pairs")
    model = save_policy(directory / "model", "llama-14m")
    everything = pairs_of(real_sequences(1 << 20, VOCABULARY))
    pairs = everything[:: len(everything) // (UPDATES * PAIRS_PER_UPDATE)][: UPDATES * PAIRS_PER_UPDATE]
    ours, theirs, reference = list[float](), list[float](), list[float]()
    with ExitStack() as stack:
        trl, ranks = start_trl(stack, "dpo_trl", model, pairs), start_ranks(stack, "dpo_rank", model, pairs)
        _require_agreement(_ours(ranks, 0), _theirs(trl))
        for update in progress([*range(UPDATES_PER_TURN, UPDATES, UPDATES_PER_TURN)] * EPOCHS, "turns"):
            if update == UPDATES_PER_TURN and ours:  # what the turn before the first epoch was for; TRL's order goes on
                _ours(ranks, 0)
                _theirs(trl)
            answer = _ours(ranks, update)
            ours.append(answer["seconds"])
            reference.append(answer["reference"])
            theirs.append(_theirs(trl)["seconds"])
    return _figures(
        by_epochs(ours), by_epochs(theirs), by_epochs(reference), len(pairs) - UPDATES_PER_TURN * PAIRS_PER_UPDATE
    )


def _figures(ours: Sequence[float], theirs: Sequence[float], reference: Sequence[float], pairs: int) -> Figures:
    conditions = (
        f"llama-14m, {pairs} real pairs of at most {LONGEST} tokens a side, {PAIRS_PER_UPDATE} an update, bf16; here with fp32 "
        f"masters on {RANKS} ranks of one thread, {pairs / median(ours):.1f} pairs/s with the reference of every pair; in "
        f"turns of {UPDATES_PER_TURN} updates, median of {EPOCHS} epochs"
    )
    method = (
        f"seconds of TRL 1.16's DPOTrainer, bf16 weights, {THREADS} threads, in arrival order, over ours; {conditions}"
    )
    ratio = median(one / other for one, other in zip(theirs, ours, strict=True))
    share = median(one / other for one, other in zip(reference, ours, strict=True))
    return {
        "dpo.pairs_per_second_vs_trl": Figure(ratio, "x", True, method),
        "dpo.reference_share": Figure(
            share, "", False, f"seconds of the reference, which a run takes once, of all; {conditions}"
        ),
    }


def start_trl(stack: ExitStack, script: str, model: Path, rows: Sequence[Pair]) -> LineProcess:
    """Start a trainer of TRL, ready for its first update; ``rows`` are lists of token ids."""
    kept = {name: os.environ[name] for name in environment.KEPT if name in os.environ}
    command = [environment.python(), Path(__file__).parent / "peers" / f"{script}.py"]
    peer = stack.enter_context(LineProcess(command, kept | for_process(threads=THREADS)))
    peer.send(
        model=str(model), directory=str(model.parent / "trl"), pairs=rows, strategy="sequential", every=1,
        turn=UPDATES_PER_TURN, epochs=EPOCHS + 1, longest=LONGEST,
    )  # fmt: skip
    assert peer.receive()["rows"] == [*range(len(rows))], "TRL has another order"
    return peer


def start_ranks(stack: ExitStack, module: str, model: Path, rows: Sequence[Pair]) -> list[LineProcess]:
    """Start this project's ranks, ready for their first update."""
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", f"benchmarks.peers.{module}"]
    ranks = [stack.enter_context(LineProcess(command, {**os.environ, **for_process()})) for _ in range(RANKS)]
    for number, rank in enumerate(ranks):
        rank.send(rank=number, ranks=RANKS, model=str(model), pairs=rows, port=port)
    for rank in ranks:
        rank.receive()
    return ranks


def _ours(ranks: Sequence[LineProcess], first: int) -> dict[str, float]:
    for rank in ranks:
        rank.send(first=first, updates=UPDATES_PER_TURN)
    answers = [rank.receive() for rank in ranks]
    losses = [sum(parts) for parts in zip(*(answer["losses"] for answer in answers), strict=True)]
    slowest = max(answers, key=lambda answer: answer["seconds"])
    return {"seconds": slowest["seconds"], "reference": slowest["reference"], "loss": sum(losses) / len(losses)}


def _theirs(peer: LineProcess) -> dict[str, float]:
    peer.send(updates=UPDATES_PER_TURN)
    answer = peer.receive()
    return {"seconds": answer["seconds"], "loss": sum(answer["losses"]) / len(answer["losses"])}


def _require_agreement(ours: dict[str, float], theirs: dict[str, float]) -> None:
    if not abs(ours["loss"] - theirs["loss"]) < AGREES_TO:
        raise AssertionError(
            f"the first loss is {ours['loss']:.4f} here and {theirs['loss']:.4f} there: nothing to compare"
        )


def by_epochs(turns: Sequence[float]) -> list[float]:
    """The seconds of each epoch; a single turn cannot be compared, since different sides run different rows in it."""
    size = len(turns) // EPOCHS
    return [sum(turns[start : start + size]) for start in range(0, len(turns), size)]


def pairs_of(sequences: Sequence[object]) -> list[Pair]:
    """What both sides begin with is the prompt; pairs of which one side is all prompt are left out."""
    sides = [sequence.tolist() for sequence in sequences]  # type: ignore[attr-defined]
    found = []
    for chosen, rejected in zip(sides[0::2], sides[1::2], strict=True):
        prompt = shared_length(chosen, rejected)
        if 0 < prompt < min(len(chosen), len(rejected)):
            found.append([chosen[:prompt], chosen[prompt:], rejected[prompt:]])
    return found


def _alone(directory: Path) -> Figures:
    """For ``--quick``: our side alone, in this process, over random pairs with a common prefix."""
    model = save_policy(directory / "model", "llama-tiny")
    sides = [sequence.tolist() for sequence in ragged_sequences(2 * PAIRS_PER_UPDATE, VOCABULARY, longest=32)]
    pairs = [as_pair(sides[0] * 2, *pair) for pair in zip(sides[0::2], sides[1::2], strict=True)]
    turn = Rank(0, 1, str(model), pairs, None).turn(0, 1)
    conditions = f"llama-tiny, one update of {PAIRS_PER_UPDATE} random pairs in this process"
    return {"dpo.reference_share": Figure(turn["reference"] / turn["seconds"], "", False, conditions)}
