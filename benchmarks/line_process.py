"""A process that is asked turn by turn: a line of JSON goes in, a line comes out; in between it waits and costs nothing.

Always true: what it prints besides answers is shown; one that ends early is an error that says so; memory is counted from
after its imports, which it says are done by its first answer.
"""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

SECONDS_BETWEEN_LOOKS = 0.05


class Asked:
    """The process; its peak of anonymous memory above that of its imports is in ``peak``."""

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        self.name = Path(command[-1]).name
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=dict(environment),
            cwd=Path(__file__).parents[1],
        )  # fmt: skip
        self.answer()
        self._imported, self.peak = anonymous(self._process.pid), 0
        self._watching = threading.Event()
        self._watch = threading.Thread(target=self._look, daemon=True)
        self._watch.start()

    def ask(self, **order: Any) -> None:
        """Send an order; :meth:`answer` waits for its answer."""
        assert self._process.stdin is not None, "opened above"
        self._process.stdin.write(f"{json.dumps(order)}\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:
        """The next answer."""
        assert self._process.stdout is not None, "opened above"
        for line in self._process.stdout:
            if line.startswith('{"'):  # a dict that is printed begins otherwise
                told: dict[str, Any] = json.loads(line)
                return told
        raise RuntimeError(f"{self.name} ended (exit code {self._process.wait()}): its output above says why")

    def _look(self) -> None:
        while not self._watching.wait(SECONDS_BETWEEN_LOOKS):
            self.peak = max(self.peak, anonymous(self._process.pid) - self._imported)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watching.set()
        self._watch.join()
        self._process.kill()
        self._process.wait()


def anonymous(process: int) -> int:
    """Bytes of anonymous memory that a process has now."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it ended
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)
