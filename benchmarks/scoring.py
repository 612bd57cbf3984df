"""Part ``scoring``: speed of the offline scorer and of the service over HTTP, with the clients on the same cores.

Invariants: both sides of a ratio are measured in turns in the same run, over the same items and with the same threads. A
request that fails ends the measurement.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks import scoring_peers
from benchmarks.figures import Figure, Figures
from benchmarks.sequences import ragged_sequences
from benchmarks.service.load import Order, Outcome, run
from benchmarks.service.ray_serve import behind_ray_serve
from benchmarks.service.reward_service import (
    VOCABULARY,
    Instant,
    Service,
    bodies,
    load_group,
    role_of,
    save_model,
    serving,
)
from rlhf_ray.actors.groups import RewardGroup
from rlhf_ray.rewards.request import ScoreRequest

THREADS = 2
BATCH_TOKENS = 8192
CLIENTS = 64
LOADS = (0.5, 0.8, 1.0)


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    large: str
    small: str
    large_items: int
    small_items: int
    transport: int
    seconds: float
    repeats: int
    ray_serve: bool
    """Whether the transport behind Ray Serve is measured too, which starts Ray."""


FULL = Size("llama-120m", "llama-14m", 128, 1024, 4000, 20.0, 3, True)
QUICK = Size("llama-tiny", "llama-tiny", 64, 128, 128, 0.5, 1, False)


def measure(quick: bool = False) -> Figures:
    """Rates over HTTP as shares of the offline scorer's, the transport alone, latencies under load, and the peers."""
    size = QUICK if quick else FULL
    before = torch.get_num_threads()
    try:
        with TemporaryDirectory() as name:
            over_http = {**_large(Path(name), size), **_small(Path(name), size), **_transport(Path(name), size)}
    finally:
        torch.set_num_threads(before)
    return {**over_http, **scoring_peers.measure(quick)}


def _large(directory: Path, size: Size) -> Figures:
    role = role_of(save_model(directory / "large", size.large), threads=THREADS)
    group = load_group(role, max_batch_tokens=BATCH_TOKENS)
    sequences = _sequences(size.large_items)
    with (
        serving(role, group, max_batch_tokens=BATCH_TOKENS) as service,
        serving(role, group, max_batch_tokens=1) as one_by_one,
    ):
        rates = _in_turns(
            size.repeats,
            lambda: _offline(group, sequences),
            lambda: _over_http(service.host, service.port, sequences, 1),
            lambda: _over_http(one_by_one.host, one_by_one.port, sequences, 1),
        )
        offline, http, single = rates
        capacity = median(http)
        latencies = {load: _latency(service, sequences, load * capacity, size.seconds) for load in LOADS}
    method = (
        f"{size.large}, bf16, {len(sequences)} random items, {THREADS} threads, {CLIENTS} clients with one item a request on "
        f"the same cores, {{}}; median of {size.repeats} turns"
    )
    figures = {
        "scoring.http_vs_offline": Figure(
            _ratio(http, offline), "x", True, method.format("items a second over the offline scorer's")
        ),
        "scoring.http_vs_forward_per_request": Figure(
            _ratio(http, single), "x", True, method.format("items a second over those of a forward a request")
        ),
    }
    for load, outcome in latencies.items():
        for share in (0.5, 0.99):
            conditions = (
                f"{size.large}, Poisson arrivals at {load:.0%} of capacity for {size.seconds:g} s over 512 connections"
            )
            name = f"scoring.latency_p{share * 100:.0f}_at_{load * 100:.0f}"
            figures[name] = Figure(1000 * outcome.percentile(share), "ms", False, conditions)
    return figures


def _small(directory: Path, size: Size) -> Figures:
    role = role_of(save_model(directory / "small", size.small), threads=THREADS)
    group = load_group(role, max_batch_tokens=BATCH_TOKENS)
    sequences = _sequences(size.small_items)
    with serving(role, group, max_batch_tokens=BATCH_TOKENS) as service:
        offline, http = _in_turns(
            size.repeats,
            lambda: _offline(group, sequences),
            lambda: _over_http(service.host, service.port, sequences, 64, clients=4),
        )
    method = (
        f"{size.small}, bf16, {len(sequences)} random items, {THREADS} threads, requests of 64 items from 4 clients on the "
        f"same cores over the offline scorer; median of {size.repeats} turns"
    )
    return {"scoring.http_batched_vs_offline": Figure(_ratio(http, offline), "x", True, method)}


def _transport(directory: Path, size: Size) -> Figures:
    role, sequences = role_of(directory / "none", threads=1), [[1, 2, 3]] * size.transport
    method = f"{size.transport} requests of one item from {CLIENTS} clients on the same cores, no model behind, {{}}"
    with serving(role, lambda _: Instant()) as service:
        rate = _over_http(service.host, service.port, sequences, 1)
    figures = {"scoring.transport_requests_per_second": Figure(rate, "requests/s", True, method.format("uvicorn"))}
    if size.ray_serve:
        with behind_ray_serve() as (host, port):
            _over_http(host, port, sequences[:CLIENTS], 1)
            rate = _over_http(host, port, sequences, 1)
        name = "scoring.transport_ray_serve_requests_per_second"
        figures[name] = Figure(
            rate, "requests/s", True, method.format("the same app in one replica behind Ray Serve's proxy")
        )
    return figures


def _sequences(count: int) -> list[list[int]]:
    return [sequence.tolist() for sequence in ragged_sequences(count, VOCABULARY)]


def _offline(group: RewardGroup, sequences: list[list[int]]) -> float:
    """Items a second of the group when it gets all at once."""
    requests = [ScoreRequest(token_ids=tuple(sequence)) for sequence in sequences]
    started_at = time.monotonic()
    results = group.score(requests).result()
    elapsed = time.monotonic() - started_at
    assert all(result.error is None for result in results)
    return len(requests) / elapsed


def _over_http(host: str, port: int, sequences: list[list[int]], items: int, clients: int = CLIENTS) -> float:
    """Items a second over HTTP, with ``items`` a request."""
    outcome = run(Order(host, port, "/v1/reward", bodies(sequences, items), clients))
    _require_answers(outcome)
    return len(sequences) / outcome.elapsed


def _latency(service: Service, sequences: list[list[int]], rate: float, seconds: float) -> Outcome:
    order = Order(service.host, service.port, "/v1/reward", bodies(sequences, 1), 512, rate=rate, seconds=seconds)
    outcome = run(order)
    _require_answers(outcome)
    return outcome


def _require_answers(outcome: Outcome) -> None:
    if outcome.count(200) != len(outcome.statuses):
        raise AssertionError(f"requests failed: {sorted(set(outcome.statuses))}")


def _in_turns(repeats: int, *sides: Callable[[], float]) -> list[list[float]]:
    """The rates of each side, measured in turns after a turn of each to warm up."""
    for side in sides:
        side()
    turns = [[side() for side in sides] for _ in range(repeats)]
    return [list(rates) for rates in zip(*turns, strict=True)]


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return median(one / other for one, other in zip(ours, theirs, strict=True))
