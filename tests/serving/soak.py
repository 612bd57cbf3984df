"""A service under load for as long as one likes: steady arrivals, five times too many, clients that hang up.

    python -m tests.serving.soak [--steady-s 600] [--overload-s 120] [--shape llama-14m]

runs the long forms over a real reward model and prints what it found; ``make test`` runs short forms over a model whose
forward is a wait, so that they cost little of the machine. Each campaign returns what it measured, and
:meth:`Finding.require` raises where a promise was broken.
"""

from __future__ import annotations

import argparse
import asyncio
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import psutil

from benchmarks.sequences import ragged_sequences
from benchmarks.service.load import HUNG_UP, Order, Outcome, run
from benchmarks.service.reward_service import Instant, Service, bodies, load_group, role_of, save_model, serving
from rlhf_ray import environment
from rlhf_ray.rewards.request import ScoreRequest, ScoreResult

LOAD, TIMES_TOO_MANY, HANG_UP = 0.8, 5.0, 1 / 3
CONNECTIONS = 512
QUEUE_ITEMS = 192
"""Fewer than connections: else all that five times too many could do is wait."""
REJECTED_WITHIN_S = 0.05
BACK_WITHIN_S = 10.0
GROWTH_A_MINUTE = 0.01
SAMPLE_S = 1.0


class Waits(Instant):
    """Takes its time for a forward, and none of the processor's."""

    def __init__(self, seconds: float = 0.02, tokens_per_second: float = 20_000.0) -> None:
        self.seconds, self.tokens_per_second = seconds, tokens_per_second
        self.scored = 0

    async def score(self, requests: Sequence[ScoreRequest]) -> Sequence[ScoreResult]:
        self.scored += len(requests)
        tokens = sum(len(request.token_ids or ()) for request in requests)
        await asyncio.sleep(self.seconds + tokens / self.tokens_per_second)
        return await super().score(requests)


@dataclass
class Finding:
    """What a campaign measured, and which promises it broke."""

    name: str
    figures: dict[str, float] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def expect(self, kept: bool, promise: str) -> None:
        """Note a promise that was not kept."""
        if not kept:
            self.broken.append(promise)

    def require(self) -> Finding:
        """Raise where a promise was broken."""
        assert not self.broken, f"{self.name}: {'; '.join(self.broken)} ({self})"
        return self

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.4g}" for name, value in self.figures.items())


class Memory:
    """Samples of this process's proportional share of memory, while the block lasts."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, float]] = []
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        process = psutil.Process()
        while not self._over.wait(SAMPLE_S):
            self.samples.append((time.monotonic(), process.memory_full_info().pss))

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def growth_a_minute(self) -> float:
        """Slope of the least-squares line over the last three quarters, as a share of the first sample there, a minute."""
        kept = self.samples[len(self.samples) // 4 :]
        if len(kept) < 3:
            return 0.0
        times, values = zip(*kept, strict=True)
        middle, mean = sum(times) / len(times), sum(values) / len(values)
        above = sum((t - middle) * (v - mean) for t, v in kept)
        return 60 * above / sum((t - middle) ** 2 for t in times) / values[0]


@dataclass(frozen=True)
class Load:
    """A service and what it is asked."""

    service: Service
    bodies: Sequence[str]

    def send(self, rate: float, seconds: float, *, hang_up: float = 0.0) -> Outcome:
        """Poisson arrivals."""
        order = Order(
            self.service.host, self.service.port, "/v1/reward", self.bodies, CONNECTIONS, rate=rate, seconds=seconds,
            hang_up=hang_up,
        )  # fmt: skip
        return run(order)

    def capacity(self, count: int) -> float:
        """Requests a second of a closed loop of as many connections as later."""
        bodies = [self.bodies[i % len(self.bodies)] for i in range(count)]
        outcome = run(Order(self.service.host, self.service.port, "/v1/reward", bodies, 64))
        assert outcome.count(200) == count, f"requests failed: {set(outcome.statuses)}"
        return count / outcome.elapsed

    def metric(self, name: str, **labels: str) -> float:
        """A metric of the service."""
        return self.service.metrics.registry.get_sample_value(f"rlhf_scoring_{name}", labels) or 0.0


def steady(load: Load, capacity: float, seconds: float) -> Finding:
    """Arrivals at 80 % of capacity: no request fails."""
    finding = Finding("steady")
    with Memory() as memory:
        outcome = load.send(LOAD * capacity, seconds)
    failed = len(outcome.statuses) - outcome.count(200)
    finding.figures = {
        "requests": len(outcome.statuses), "failed": failed, "p50_ms": 1000 * outcome.percentile(0.5),
        "p99_ms": 1000 * outcome.percentile(0.99), "growth_a_minute": memory.growth_a_minute(),
    }  # fmt: skip
    finding.expect(len(outcome.statuses) > 0.8 * LOAD * capacity * seconds, "arrivals came as fast as they should")
    finding.expect(failed == 0, "no request fails at 80 % of capacity")
    return finding


def overload(load: Load, capacity: float, seconds: float) -> Finding:
    """Five times too many: refused at once, bounded memory, and the baseline again soon after."""
    finding = Finding("overload")
    baseline = load.send(LOAD * capacity, min(seconds, 10.0)).percentile(0.5)
    with Memory() as memory:
        outcome = load.send(TIMES_TOO_MANY * capacity, seconds)
    refused = load.metric("refusal_seconds_count")
    at_once = load.metric("refusal_seconds_bucket", le=str(REJECTED_WITHIN_S))
    after = outcome.elapsed - seconds + _baseline_again(load, capacity, baseline)  # since the last of too many arrived
    finding.figures = {
        "requests": len(outcome.statuses), "answered": outcome.count(200), "refused": outcome.count(503),
        "refused_within_50_ms": at_once / max(refused, 1.0), "growth_a_minute": memory.growth_a_minute(),
        "baseline_again_s": after,
    }  # fmt: skip
    finding.expect(outcome.count(200, 503) == len(outcome.statuses), "every answer is a score or a refusal")
    finding.expect(outcome.count(503) > 0, "five times too many are more than it takes")
    finding.expect(at_once >= refused / 2, "the median refusal takes at most 50 ms")
    finding.expect(after <= BACK_WITHIN_S, "the baseline is back within 10 s")
    if seconds >= 60:
        finding.expect(memory.growth_a_minute() < GROWTH_A_MINUTE, "memory grows less than 1 % a minute after warm-up")
    return finding


def _baseline_again(load: Load, capacity: float, baseline: float) -> float:
    """Seconds until the median latency of a second's arrivals is the baseline's again, or close to it."""
    began = time.monotonic()
    while time.monotonic() - began < 3 * BACK_WITHIN_S:
        window = time.monotonic()
        if load.send(LOAD * capacity, 1.0).percentile(0.5) < 1.5 * baseline + 0.05:
            return window - began
    return float("inf")


def hanging_up(load: Load, capacity: float, seconds: float) -> Finding:
    """A third of the clients hang up while others wait: the rest is answered, and those cost no forward."""
    finding = Finding("hanging up")
    scored = load.metric("items_total", model="reward")
    outcome = load.send(1.5 * capacity, seconds, hang_up=HANG_UP)
    gone = outcome.count(HUNG_UP)
    time.sleep(1.0)
    extra = load.metric("items_total", model="reward") - scored - outcome.count(200)
    finding.figures = {
        "requests": len(outcome.statuses),
        "hung_up": gone,
        "scored_for_nobody": extra,
        "waiting": load.service.models.waiting,
    }
    finding.expect(outcome.count(200, 503, HUNG_UP) == len(outcome.statuses), "who stays is answered")
    finding.expect(gone > 0.2 * len(outcome.statuses), "a third hangs up")
    finding.expect(extra <= 0.25 * gone, "clients that hang up are scored only where they were in the model already")
    finding.expect(load.service.models.waiting == 0, "nothing waits for nobody")
    return finding


def made_bodies(count: int, longest: int = 512) -> list[str]:
    """Requests of one item each."""
    return bodies([sequence.tolist() for sequence in ragged_sequences(count, 4096, longest=longest)], 1)


@contextmanager
def real_service(shape: str, **settings: Any) -> Iterator[Service]:
    """A reward model of a made shape at a port."""
    with TemporaryDirectory() as name:
        role = role_of(save_model(Path(name), shape), threads=1)
        with serving(role, load_group(role, max_batch_tokens=8192), **settings) as service:
            yield service


def main() -> None:
    """The long forms."""
    parser = argparse.ArgumentParser(prog="tests.serving.soak", description="a service under load for a long time")
    parser.add_argument("--steady-s", type=float, default=600.0)
    parser.add_argument("--overload-s", type=float, default=120.0)
    parser.add_argument("--shape", default="llama-14m")
    arguments = parser.parse_args()
    environment.prepare()
    with real_service(arguments.shape, max_queue_items=QUEUE_ITEMS) as service:
        load = Load(service, made_bodies(512))
        load.capacity(200)
        capacity = load.capacity(2000)
        print(f"capacity: {capacity:.0f} requests/s", flush=True)
        findings = []
        for campaign, seconds in (
            (steady, arguments.steady_s),
            (overload, arguments.overload_s),
            (hanging_up, min(60.0, arguments.overload_s)),
        ):
            finding = campaign(load, capacity, seconds)
            broken = "".join(f" BROKEN: {promise}" for promise in finding.broken)
            print(f"{finding.name}, {seconds:.0f} s: {finding}{broken}", flush=True)
            findings.append(finding)
    raise SystemExit(any(finding.broken for finding in findings))


if __name__ == "__main__":
    main()
