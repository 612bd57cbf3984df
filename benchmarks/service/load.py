"""Put a scoring backend under load from a process of its own: clients that never pause, or arrivals at a given rate.

    python -m benchmarks.service.load < ORDER.json > OUTCOME.json

Invariants: in the open loop the time of a request counts from its arrival, whether or not a connection was free. Every
request that arrived has an outcome: its HTTP status, 0 if the connection failed, -1 if the client hung up on purpose.
"""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HUNG_UP, BROKEN = -1, 0


@dataclass(frozen=True)
class Order:
    """What to send: each of ``bodies`` once in the closed loop, bodies drawn at random in the open loop."""

    host: str
    port: int
    path: str
    bodies: Sequence[str]
    connections: int
    token: str = ""
    rate: float = 0.0
    """Arrivals a second, as a Poisson process; 0 is the closed loop."""
    seconds: float = 0.0
    hang_up: float = 0.0
    """The share of requests whose client hangs up without reading the answer."""
    seed: int = 0


@dataclass
class Outcome:
    """The status and the seconds of each request, and the seconds of all together."""

    statuses: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    elapsed: float = 0.0

    def add(self, status: int, started_at: float) -> None:
        """Note that a request ended."""
        self.statuses.append(status)
        self.seconds.append(time.monotonic() - started_at)

    def percentile(self, share: float) -> float:
        """The time in seconds within which this share of the answered requests ended."""
        times = sorted(t for t, status in zip(self.seconds, self.statuses, strict=True) if status > 0)
        return times[min(int(share * len(times)), len(times) - 1)] if times else 0.0

    def count(self, *statuses: int) -> int:
        """How many requests ended with one of these statuses."""
        return sum(status in statuses for status in self.statuses)


class Connection:
    """One keep-alive connection with as little HTTP as it needs, so that the client uses little of the processor."""

    def __init__(self, order: Order) -> None:
        self._order = order
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None
        token = f"Authorization: Bearer {order.token}\r\n" if order.token else ""
        self._head = (
            f"POST {order.path} HTTP/1.1\r\nHost: x\r\n{token}Content-Type: application/json\r\nContent-Length: "
        )

    async def post(self, body: str, *, hang_up: bool = False) -> int:
        """Send one request and return its status."""
        content = body.encode()
        try:
            reader, writer = await self._open()
            writer.write(f"{self._head}{len(content)}\r\n\r\n".encode() + content)
            await writer.drain()
            if hang_up:
                await asyncio.sleep(0.01)
                self.close()
                return HUNG_UP
            return await self._answer(reader)
        except (OSError, asyncio.IncompleteReadError, ValueError, IndexError):
            self.close()
            return BROKEN

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(self._order.host, self._order.port)
        return self._streams

    async def _answer(self, reader: asyncio.StreamReader) -> int:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        length = int(head.split("content-length:")[1].split("\r\n")[0])
        await reader.readexactly(length)
        return int(head.split(" ", 2)[1])

    def close(self) -> None:
        """Hang up."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def closed_loop(order: Order) -> Outcome:
    """Each connection sends one request after another until all bodies have been answered."""
    outcome, bodies, started_at = Outcome(), iter(order.bodies), time.monotonic()

    async def client() -> None:
        connection = Connection(order)
        for body in bodies:
            sent = time.monotonic()
            outcome.add(await connection.post(body), sent)
        connection.close()

    await asyncio.gather(*(client() for _ in range(order.connections)))
    outcome.elapsed = time.monotonic() - started_at
    return outcome


async def open_loop(order: Order) -> Outcome:
    """Requests arrive as a Poisson process; each takes the first connection that is free."""
    outcome, draw, free = Outcome(), random.Random(order.seed), asyncio.Queue[Connection]()
    for _ in range(order.connections):
        free.put_nowait(Connection(order))

    async def arrival(arrived: float, body: str, hang_up: bool) -> None:
        connection = await free.get()
        outcome.add(await connection.post(body, hang_up=hang_up), arrived)
        free.put_nowait(connection)

    started_at, tasks = time.monotonic(), []
    due = started_at
    while (due := due + draw.expovariate(order.rate)) < started_at + order.seconds:
        await asyncio.sleep(max(due - time.monotonic(), 0.0))
        tasks.append(asyncio.create_task(arrival(due, draw.choice(order.bodies), draw.random() < order.hang_up)))
    await asyncio.gather(*tasks)
    outcome.elapsed = time.monotonic() - started_at
    while not free.empty():
        free.get_nowait().close()
    return outcome


def run(order: Order) -> Outcome:
    """Run an order in a process of its own."""
    limit = 120 + 3 * order.seconds
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.service.load"],
        input=json.dumps(asdict(order)),
        capture_output=True,
        text=True,
        timeout=max(limit, 900) if not order.seconds else limit,
        cwd=Path(__file__).parents[2],
    )
    if done.returncode != 0:
        raise RuntimeError(f"the load generator failed: {done.stderr[-2000:]}")
    outcome: dict[str, Any] = json.loads(done.stdout)
    return Outcome(**outcome)


def main() -> None:
    """Read an order from standard input, run it, and write the outcome to standard output."""
    order = Order(**json.load(sys.stdin))
    outcome = asyncio.run(open_loop(order) if order.rate else closed_loop(order))
    json.dump(asdict(outcome), sys.stdout)


if __name__ == "__main__":
    main()
