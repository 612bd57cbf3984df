"""One rank of the engine's tests: runs every scenario in turn and writes what it measured as JSON.

Usage: rank_program.py RANK WORLD_SIZE PORT DIRECTORY
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import deepspeed
import held_memory
import psutil
import pytest
import torch
from inspect_engine import bits, digest, first_gradient, same_bits, steps, weights
from other_ranks import gone_on, odd_engine, saved
from torch import Tensor
from toy import (
    TOTAL_UPDATES,
    Micro,
    Toy,
    TwoHeads,
    change,
    distance,
    engine_config,
    loss_of,
    make,
    make_batch,
    reference,
    split,
    tokens,
)

from rlhf_ray.algorithms.losses import LossOutput
from rlhf_ray.engine import (
    Applied,
    Engine,
    deepspeed_config,
    destroy_process_group,
    init_process_group,
    rendezvous,
    shards,
)
from rlhf_ray.engine.distributed import all_agree
from rlhf_ray.errors import RlhfRayError
from rlhf_ray.storage.manifest import FileRecord

BATCHES = [make_batch(1), make_batch(2)]
Measured = dict[str, Any]


class Program:
    """What every scenario needs to know."""

    def __init__(self, rank: int, world: int, directory: Path) -> None:
        self.rank, self.world, self.directory = rank, world, directory
        self.reference, self.tied = reference(BATCHES), reference(BATCHES, tied=True)
        self.start = {tied: {n: p.detach().clone() for n, p in make(tied=tied).named_parameters()} for tied in (0, 1)}

    def engine(self, zero: int, dtype: str, *, tied: bool = False, **options: Any) -> Engine:
        """A fresh engine around the same toy."""
        config = engine_config(zero, **options)
        return Engine(make(tied=tied), config, dtype=dtype, total_updates=TOTAL_UPDATES, trainable=True)

    def update(self, engine: Engine, batch: list[Tensor], count: int, limit: float = math.inf) -> tuple[Any, Applied]:
        """Accumulate and apply."""
        report = engine.accumulate(split(batch, self.world, count)[self.rank], loss_of, tokens(batch))
        return report, engine.apply(skip=not report.finite, limit=limit)

    def poisoned(self, count: int, where: tuple[int, int], poison: str | None) -> list[Micro]:
        """This rank's micro-batches of an update in which one micro-batch of one rank is bad."""
        micro_batches = split(BATCHES[0], self.world, count)[self.rank]
        rank, k = where
        if rank == self.rank:
            micro_batches[k] = Micro(micro_batches[k].sequences, poison)
        return micro_batches


def matrix(program: Program, zero: int, dtype: str, count: int, *, tied: bool = False) -> Measured:
    """Two clean updates against the reference; then the same with dropped updates in between, bit for bit."""
    expected = program.tied if tied else program.reference
    engine = program.engine(zero, dtype, tied=tied)
    first, _ = program.update(engine, BATCHES[0], count)
    gradient, after_first = first_gradient(engine), weights(engine)
    _, applied = program.update(engine, BATCHES[1], count)
    measured: Measured = {
        "loss": first.loss, "metrics": first.metrics, "update": applied.update, "steps": steps(engine),
        "weights": digest(engine),
    }  # fmt: skip
    if program.rank == 0:
        start, after_second = program.start[tied], weights(engine)
        measured |= {
            "expected_loss": expected.losses[0],
            "gradient_error": distance(gradient, expected.gradients[0]),
            "update_error": distance(change(after_first, start), change(expected.weights[0], start)),
            "second_update_error": distance(change(after_second, start), change(expected.weights[1], start)),
            "norm_error": abs(applied.grad_norm - expected.norms[1]) / expected.norms[1],
        }
    else:
        weights(engine)
    measured |= _with_bad_updates(program, zero, dtype, count, tied, bits(engine))
    engine.close()
    return measured


def _with_bad_updates(program: Program, zero: int, dtype: str, count: int, tied: bool, clean: list[Tensor]) -> Measured:
    engine = program.engine(zero, dtype, tied=tied)
    first, last = (0, 0), (program.world - 1, 0)
    outcomes = [_dropped(program, engine, count, "loss", last), _dropped(program, engine, count, None, first)]
    engine.evaluate(lambda module: module(BATCHES[0][: 1 + program.rank]).log_probs)
    norm = program.update(engine, BATCHES[0], count)[1].grad_norm
    assert norm is not None
    outcomes += [
        _dropped(program, engine, count, "gradient", (0, count - 1)),
        _dropped(program, engine, count, None, first),
        _dropped(program, engine, count, "loss", first, obeys=False),
        _dropped(program, engine, count, None, first, obeys=False, limit=norm / 2),
    ]
    program.update(engine, BATCHES[1], count, limit=1e6)
    same = same_bits(clean, bits(engine))
    engine.close()
    return {"dropped": outcomes, "as_if_never": same}


def _dropped(
    program: Program,
    engine: Engine,
    count: int,
    poison: str | None,
    where: tuple[int, int],
    *,
    obeys: bool = True,
    limit: float = math.inf,
) -> dict[str, Any]:
    """One update that is dropped: a bad one, or (no poison) a good one that another group has voted down.

    With ``obeys=False`` the caller applies it all the same, and the engine must refuse by itself, for instance because the norm
    of its gradient is above ``limit``.
    """
    before = bits(engine)
    report = engine.accumulate(program.poisoned(count, where, poison), loss_of, tokens(BATCHES[0]))
    applied = engine.apply(skip=obeys, limit=limit)
    return {
        "refused": None if math.isinf(limit) else (applied.refused_norm or 0.0) / limit,
        "finite": report.finite, "expected_finite": poison is None, "skipped": applied.skipped,
        "update": applied.update, "norm": applied.grad_norm, "unchanged": same_bits(before, bits(engine)),
    }  # fmt: skip


def clipped(program: Program, zero: int) -> Measured:
    """Gradients above the bound are scaled down to it."""
    bound = program.reference.norms[0] / 3
    expected = reference(BATCHES, max_grad_norm=bound)
    engine = program.engine(zero, "fp32", max_grad_norm=bound)
    applied = [program.update(engine, batch, 4)[1] for batch in BATCHES]
    state, start = weights(engine), program.start[False]
    engine.close()
    if program.rank > 0:
        return {"norms": [a.grad_norm for a in applied]}
    error = distance(change(state, start), change(expected.weights[1], start))
    return {"norms": [a.grad_norm for a in applied], "expected": expected.norms, "bound": bound, "update_error": error}


def built_in_shards(program: Program) -> Measured:
    """A module that was never whole on any rank trains as one that was."""
    config = engine_config(3)
    settings = deepspeed_config(config, dtype="fp32", trainable=True, world_size=program.world)
    with deepspeed.zero.Init(config_dict_or_path=settings):
        module = make()
    sizes = {parameter.numel() for parameter in module.parameters()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlhf_ray.engine.settings.LIVE", 0)  # a least number that no layer of a toy reaches
        engine = Engine(module, config, dtype="fp32", total_updates=TOTAL_UPDATES, trainable=True)
    kept = engine._deepspeed.zero_max_live_parameters(), engine._deepspeed.zero_max_reuse_distance()
    for batch in BATCHES:
        program.update(engine, batch, 4)
    state, start = weights(engine), program.start[False]
    engine.close()
    layer = sum(parameter.numel() for parameter in make().get_submodule("layers.0").parameters())
    measured: Measured = {"sizes": sorted(sizes), "kept": kept, "layer": layer}
    if program.rank == 0:
        measured["update_error"] = distance(change(state, start), change(program.reference.weights[1], start))
    return measured


def neighbours(program: Program, ours: tuple[int, str], theirs: tuple[int, str]) -> Measured:
    """Two engines in one process, as policy and critic of a small run, train as each does alone; one vote for both."""

    def alone(kind: tuple[int, str]) -> list[Tensor]:
        engine = program.engine(*kind)
        for batch in BATCHES:
            program.update(engine, batch, 4)
        state = bits(engine)
        engine.close()
        return state

    expected = alone(ours), alone(theirs)
    engines = program.engine(*ours), program.engine(*theirs)
    votes = []
    for poison, batch in ((None, BATCHES[0]), ("gradient", BATCHES[0]), (None, BATCHES[1])):
        plans = (split(batch, program.world, 4)[program.rank], program.poisoned(4, (program.world - 1, 0), poison))
        plans = plans if poison else (plans[0], plans[0])
        reports = [e.accumulate(plan, loss_of, tokens(batch)) for e, plan in zip(engines, plans, strict=True)]
        votes.append([report.finite for report in reports] + [engines[0].vote(all(r.finite for r in reports))])
        for engine in reversed(engines):
            engine.apply(skip=not votes[-1][-1])
            engine.evaluate(lambda module: module(BATCHES[0]).log_probs)
    same = [same_bits(bits(engine), state) for engine, state in zip(engines, expected, strict=True)]
    for engine in engines:
        engine.close()
    return {"votes": votes, "same": same}


def offloaded(program: Program, zero: int, offload: str) -> Measured:
    """The optimizer's state, and at ZeRO-3 the weights too, live on the host; bad updates as elsewhere."""
    engine = program.engine(zero, "fp32", offload=offload)
    program.update(engine, BATCHES[0], 4)
    before = bits(engine)
    report = engine.accumulate(program.poisoned(4, (0, 1), "loss"), loss_of, tokens(BATCHES[0]))
    applied = engine.apply(skip=not report.finite)
    unchanged = same_bits(before, bits(engine))
    program.update(engine, BATCHES[1], 4)
    state, start = weights(engine), program.start[False]
    engine.close()
    measured = {"skipped": applied.skipped, "unchanged": unchanged}
    if program.rank == 0:
        measured["update_error"] = distance(change(state, start), change(program.reference.weights[1], start))
    return measured


def halved(zero: int, dtype: str, offload: str = "none") -> Engine:
    """An engine around a module of which a micro-batch uses only one half."""
    config = engine_config(zero, offload=offload)
    return Engine(make(TwoHeads), config, dtype=dtype, total_updates=TOTAL_UPDATES, trainable=True)


def halves(program: Program, zero: int, dtype: str) -> Measured:
    """Updates whose micro-batches use other halves of the module: no gradient of an earlier update comes back."""
    engine = halved(zero, dtype)
    norms = []
    for plan in (["a", "a"], ["a", "b"], ["a", "a"], ["b", "b"], ["b", "a"]):
        engine.accumulate(plan, lambda m, which: LossOutput(m(which), {}), 100.0)
        norms.append(engine.apply(skip=False).grad_norm)
    engine.close()
    return {"norms": norms}


@contextmanager
def _slow_writing(rank: int) -> Iterator[None]:
    """Let ranks but the first take a while for a file, which meanwhile has a temporary name, as with every safe writer."""
    whole = shards.save_file

    def slowly(tensors: dict[str, torch.Tensor], path: str) -> None:
        beside = Path(path).with_name(".written")
        whole(tensors, str(beside))
        time.sleep(0.3)
        beside.rename(path)

    shards.save_file = slowly if rank else whole
    try:
        yield
    finally:
        shards.save_file = whole


@contextmanager
def _written_later() -> Iterator[threading.Event]:
    """Let no rank write before the event is set."""
    write, may_write = shards.Unwritten.write, threading.Event()

    def later(self: shards.Unwritten) -> dict[str, FileRecord]:
        assert may_write.wait(60)
        return write(self)

    shards.Unwritten.write = later
    try:
        yield may_write
    finally:
        may_write.set()
        shards.Unwritten.write = write


def _saved_beside(program: Program, engine: Engine, directory: Path) -> tuple[Applied, Measured]:
    """Save, go on before a byte is written, and then load what was written into another engine: the same bits."""
    with _written_later() as may_write:
        engine.begin_saving(directory)
        _, gone_on = program.update(engine, BATCHES[1], 4)
        expected, early = bits(engine), bool(_files(directory).keys() - _scripts(directory))
        torch.distributed.barrier()  # both have looked
        may_write.set()
        hashed = engine.saved().files
    torch.manual_seed(98)
    other = Engine(Toy(), engine.config, dtype=engine.dtype, total_updates=TOTAL_UPDATES, trainable=True)
    other.load_shards(directory)
    program.update(other, BATCHES[1], 4)
    measured = {
        "same": same_bits(expected, bits(other)), "early": early, "files": _files(directory),
        "hashed": {name: record.sha256 for name, record in hashed.items()},
    }  # fmt: skip
    other.close()
    return gone_on, measured


def _scripts(directory: Path) -> set[str]:
    """What DeepSpeed puts beside its shards."""
    return {path.name for path in directory.glob("*.py")}


def resumed(program: Program, zero: int, dtype: str) -> Measured:
    """Save, go on; load into a fresh engine of other weights, go on: the same bits."""
    directory = program.directory / f"shards-{program.world}-{zero}-{dtype}"
    engine = program.engine(zero, dtype)
    program.update(engine, BATCHES[0], 4)
    with _slow_writing(program.rank):
        hashed = engine.save_shards(directory)
    noise = torch.rand(2)
    gone_on, beside = _saved_beside(program, engine, directory.with_name(f"{directory.name}-beside"))
    expected = bits(engine)
    engine.load_shards(directory)
    program.update(engine, BATCHES[1], 4)
    same_engine = same_bits(expected, bits(engine))
    engine.close()
    torch.manual_seed(99)
    other = Engine(Toy(), engine_config(zero), dtype=dtype, total_updates=TOTAL_UPDATES, trainable=True)
    other.load_shards(directory)
    same_noise = torch.rand(2).equal(noise)
    _, applied = program.update(other, BATCHES[1], 4)
    measured = {
        "same_engine": same_engine, "fresh_engine": same_bits(expected, bits(other)), "same_noise": same_noise,
        "same_applied": applied == gone_on, "before_any_update": _saved_at_the_start(program, zero, dtype),
        "refused": _refusal(lambda: _of_another_dtype(program, zero, dtype, directory)),
        "hashed": {name: record.sha256 for name, record in hashed.items()}, "files": _files(directory),
        "beside": beside,
    }  # fmt: skip
    other.close()
    return measured


def _files(directory: Path) -> dict[str, str]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _saved_at_the_start(program: Program, zero: int, dtype: str) -> bool:
    """Shards written before the first update that counts load too, and go on with the same bits."""
    directory = program.directory / f"start-{program.world}-{zero}-{dtype}"
    engine = program.engine(zero, dtype)
    engine.accumulate(program.poisoned(4, (0, 0), "loss"), loss_of, 1.0)
    engine.apply(skip=True)
    engine.save_shards(directory)
    program.update(engine, BATCHES[0], 4)
    expected = bits(engine)
    engine.close()
    fresh = program.engine(zero, dtype)
    fresh.load_shards(directory)
    program.update(fresh, BATCHES[0], 4)
    same = same_bits(expected, bits(fresh))
    fresh.close()
    return same


def _of_another_dtype(program: Program, zero: int, dtype: str, directory: Path) -> None:
    engine = program.engine(zero, "bf16" if dtype == "fp32" else "fp32")
    try:
        engine.load_shards(directory)
    finally:
        engine.close()


def _refusal(call: Callable[[], object]) -> str:
    try:
        call()
    except RlhfRayError as error:
        return f"{type(error).__name__}: {error}"
    return "accepted"


def weights_of(program: Program, zero: int, dtype: str) -> Measured:
    """Whole weights on rank 0, tied ones once, in groups of a layer, in the compute dtype."""
    engine = program.engine(zero, dtype, tied=True)
    groups = list(engine.full_state())
    start = program.start[True]
    engine.close()
    names = [[name for name, _ in group] for group in groups]
    wanted = torch.bfloat16 if dtype == "bf16" else torch.float32
    equal = all(tensor.equal(start[name].to(wanted)) for group in groups for name, tensor in group)
    return {"groups": len(groups), "names": names, "equal": equal}


def misused(program: Program) -> Measured:
    """Wrong calls end in an error on every rank, not in a wait."""
    engine = program.engine(3, "fp32")
    ragged = split(BATCHES[0], program.world, 4)[program.rank][: 3 + program.rank]
    constant = LossOutput(torch.tensor(1.0), {})
    measured = {
        "ragged": _refusal(lambda: engine.accumulate(ragged, loss_of, 10.0)),
        "none": _refusal(lambda: engine.accumulate([], loss_of, 10.0)),
        "denominator": _refusal(lambda: engine.accumulate([Micro(())], loss_of, 0.0)),
        "apply_first": _refusal(lambda: engine.apply(skip=False)),
        "no_shards": _refusal(lambda: engine.load_shards(program.directory / "none")),
    }
    engine.accumulate([Micro(())], loss_of, 1.0)
    measured["twice"] = _refusal(lambda: engine.accumulate([Micro(())], loss_of, 1.0))
    measured["evaluate"] = _refusal(lambda: engine.evaluate(lambda module: None))
    engine.apply(skip=True)
    measured["constant"] = _refusal(lambda: engine.accumulate([0], lambda module, m: constant, 1.0))
    engine.close()
    offloading = halved(2, "fp32", offload="optimizer")
    half = ["a" if program.rank == 0 else "b"]
    measured["half"] = _refusal(lambda: offloading.accumulate(half, lambda m, which: LossOutput(m(which), {}), 1.0))
    offloading.close()
    return measured


def inference(program: Program, zero: int, dtype: str) -> Measured:
    """A model that is not trained: the same outputs as plain torch, ragged ranks included."""
    sequences = BATCHES[0][: 2 + 3 * program.rank]
    plain = make()
    plain = plain.to(torch.bfloat16) if dtype == "bf16" else plain
    with torch.no_grad():
        expected = plain(sequences).log_probs
    config = engine_config(zero).model_copy(update={"optimizer": None})
    engine = Engine(make(), config, dtype=dtype, total_updates=None, trainable=False)
    outputs, training = engine.evaluate(lambda module: (module(sequences).log_probs, module.training))
    refusal = _refusal(lambda: engine.accumulate([Micro(())], loss_of, 1.0))
    engine.close()
    graph = outputs.requires_grad
    return {"equal": outputs.equal(expected), "training": training, "graph": graph, "refused": refusal}


def abandoned(rank: int, world: int, port: int) -> Measured:
    """A rank whose peer stays away from a collective of ours, and then of DeepSpeed's, gets an error at the deadline."""
    init_process_group(rank, world, rendezvous(rank, world, "127.0.0.1", port), timeout_s=3)
    engine = Engine(make(), engine_config(2), dtype="fp32", total_updates=1, trainable=True)
    gradients = engine._deepspeed.optimizer.dp_process_group
    measured: Measured = {}
    if rank == 0:
        measured["ours"] = _given_up(lambda: all_agree(True, torch.device("cpu")))
        measured["DeepSpeed's"] = _given_up(lambda: torch.distributed.all_reduce(torch.ones(1), group=gradients))
    else:
        time.sleep(12)  # with torch's deadline, of half an hour with gloo, rank 0 would wait until here
    destroy_process_group()
    return measured


def _given_up(collective: Callable[[], object]) -> Measured:
    started, error = time.monotonic(), ""
    try:
        collective()
    except RuntimeError as raised:
        error = str(raised)
    return {"error": error, "seconds": time.monotonic() - started}


def _listening() -> Measured:
    """Where this process listens, once its group has met."""
    connections = psutil.Process().net_connections(kind="inet")
    return {
        "interface": os.environ.get("GLOO_SOCKET_IFNAME"),
        "at": sorted(one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN),
    }


def _agree_on_a_free_port(rank: int) -> int:
    """Ranks that meet again meet elsewhere: at the old port a fast one could still read the addresses of the first time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        ports = [probe.getsockname()[1] if rank == 0 else None]
    torch.distributed.broadcast_object_list(ports, src=0)
    port = ports[0]
    assert port is not None
    return port


def saved_here(program: Program, zero: int) -> Measured:
    """The curve of the pair after a save that the lone rank goes on from."""
    directory = program.directory / f"odd-zero{zero}"
    measured = saved(directory, odd_engine(zero, "fp32"))
    if program.rank == 0:
        directory.with_suffix(".done").touch()
    return measured


def saved_by_the_pair(program: Program, zero: int) -> Measured:
    """The curve of the lone rank from there."""
    directory = program.directory / f"odd-zero{zero}"
    end = time.monotonic() + 300
    while not directory.with_suffix(".done").exists() and time.monotonic() < end:
        time.sleep(0.1)
    measured = gone_on(directory, odd_engine(zero, "fp32", shift=0.5))
    return measured | {"left": [path.name for path in program.directory.glob(".*")]}


def scenarios(program: Program) -> Iterator[tuple[str, Callable[[], Measured]]]:
    """Every scenario by name, in the same order on every rank."""
    if program.world == 2:
        for zero in (2, 3):
            yield f"odd-zero{zero}", lambda z=zero: saved_here(program, z)
    for dtype, zero, count in product(("fp32", "bf16"), range(4), (1, 4, 7)):
        yield f"matrix-{dtype}-zero{zero}-{count}", lambda d=dtype, z=zero, c=count: matrix(program, z, d, c)
    for zero in range(4):
        yield f"tied-fp32-zero{zero}-4", lambda z=zero: matrix(program, z, "fp32", 4, tied=True)
    yield from held_memory.scenarios(program.world)
    if program.world == 1:
        for zero in (2, 3):
            yield f"odd-zero{zero}", lambda z=zero: saved_by_the_pair(program, z)
        return
    for dtype, zero in product(("fp32", "bf16"), range(4)):
        yield f"halves-{dtype}-zero{zero}", lambda d=dtype, z=zero: halves(program, z, d)
        yield f"resumed-{dtype}-zero{zero}", lambda d=dtype, z=zero: resumed(program, z, d)
    for zero in range(4):
        yield f"clipped-zero{zero}", lambda z=zero: clipped(program, z)
    for zero, offload in ((1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all")):
        yield f"offloaded-zero{zero}-{offload}", lambda z=zero, o=offload: offloaded(program, z, o)
    for zero, dtype in ((0, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16")):
        yield f"weights-{dtype}-zero{zero}", lambda d=dtype, z=zero: weights_of(program, z, d)
    for zero, dtype in ((0, "fp32"), (3, "fp32"), (0, "bf16"), (3, "bf16")):
        yield f"inference-{dtype}-zero{zero}", lambda d=dtype, z=zero: inference(program, z, d)
    for one, other in ((0, 0), (2, 3), (3, 3)):
        yield f"neighbours-{one}-{other}", lambda a=one, b=other: neighbours(program, (a, "fp32"), (b, "bf16"))
    yield "built-in-shards", lambda: built_in_shards(program)
    yield "misused", lambda: misused(program)
    import real_models  # transformers, and only ragged ranks need it

    yield from real_models.scenarios(program.rank, program.world)


def main(rank: int, world: int, port: int, directory: Path) -> None:
    """Run all scenarios."""
    torch.set_num_threads(1)
    init_process_group(rank, world, rendezvous(rank, world, "127.0.0.1", port) if world > 1 else None, timeout_s=120)
    program, measured = Program(rank, world, directory), {"listening": _listening()}
    gc.collect()
    gc.freeze()  # DeepSpeed collects garbage at every start of an engine; what was imported need not be walked again
    for name, run in scenarios(program):
        started = time.monotonic()
        measured[name] = run() | {"seconds": time.monotonic() - started}
    another_port = _agree_on_a_free_port(rank)
    destroy_process_group()
    if world > 1:
        measured["deadline"] = abandoned(rank, world, another_port)
    (directory / f"measured-{world}-{rank}.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
