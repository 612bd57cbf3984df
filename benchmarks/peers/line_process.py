"""A child process that works in turns: a line of JSON is its order, a line of JSON its answer.

Between turns it waits and uses no processor. Its first answer says that its imports are done.

Invariants: output that is no answer is ignored. A process that ends early is an error. Memory counts from the end of the
imports.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SECONDS_BETWEEN_SAMPLES = 0.05


class LineProcess:
    """The process; ``peak`` is its largest anonymous memory so far above that after its imports, in bytes."""

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        self.name = Path(command[-1]).name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(environment),
            cwd=Path(__file__).parents[2],
        )  # fmt: skip
        self.receive()
        self._imported, self.peak = anonymous(self._process.pid), 0
        self._stopped = threading.Event()
        self._sampler = threading.Thread(target=self._sample_memory, daemon=True)
        self._sampler.start()

    def send(self, **order: Any) -> None:
        """Send an order and return at once; :meth:`receive` waits for the answer."""
        assert self._process.stdin is not None, "opened above"
        self._process.stdin.write(f"{json.dumps(order)}\n")
        self._process.stdin.flush()

    def receive(self) -> dict[str, Any]:
        """Wait for the next answer."""
        assert self._process.stdout is not None, "opened above"
        for line in self._process.stdout:
            if line.startswith('{"'):  # a Python dict that a library prints begins with {'
                answer: dict[str, Any] = json.loads(line)
                return answer
        raise RuntimeError(f"{self.name} ended (exit code {self._process.wait()}): its output above says why")

    def _sample_memory(self) -> None:
        while not self._stopped.wait(SECONDS_BETWEEN_SAMPLES):
            self.peak = max(self.peak, anonymous(self._process.pid) - self._imported)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._sampler.join()
        self._process.kill()
        self._process.wait()


def anonymous(process: int) -> int:
    """The anonymous memory of a process in bytes; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
