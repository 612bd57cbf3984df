"""vLLM's pooling runner in a process of its own, scoring the same ids whenever it is told to.

Always true: it scores with the weights of the directory it is given, its prefix cache off, or on and empty before each
turn; a turn ends in one line with its seconds and its scores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any


class PoolingPeer:
    """The process, asked turn by turn."""

    def __init__(self, directory: Path, sequences: Sequence[Sequence[int]], *, threads: int, shared: bool) -> None:
        order = {"directory": str(directory), "shared": shared, "sequences": [list(sequence) for sequence in sequences]}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.pooling_peer", str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[1],
        )
        self._tell(json.dumps(order))
        self.score()

    def score(self) -> tuple[float, list[float]]:
        """One turn: seconds and scores."""
        self._tell("score")
        assert self._process.stdout is not None, "opened above"
        for line in self._process.stdout:
            if line.startswith("{"):
                told: dict[str, Any] = json.loads(line)
                return float(told["seconds"]), list(told["scores"])
        raise RuntimeError("vLLM's pooling runner ended: its output above says why")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None, "opened above"
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def __enter__(self) -> PoolingPeer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    """Load once; then a turn for every line."""
    import os

    threads = sys.argv[1]
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": threads,
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }  # fmt: skip
    from vllm import LLM
    from vllm.config import PoolerConfig

    order = json.loads(sys.stdin.readline())
    prompts = [{"prompt_token_ids": sequence} for sequence in order["sequences"]]
    model = LLM(
        order["directory"],
        runner="pooling",
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=2048,
        enable_prefix_caching=order["shared"],
        pooler_config=PoolerConfig(use_activation=False),
    )
    for _ in sys.stdin:
        model.reset_prefix_cache()
        began = time.monotonic()
        outputs = model.classify(prompts, use_tqdm=False)
        seconds = time.monotonic() - began
        print(json.dumps({"seconds": seconds, "scores": [output.outputs.probs[0] for output in outputs]}), flush=True)


if __name__ == "__main__":
    main()
