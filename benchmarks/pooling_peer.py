"""vLLM's pooling runner in a process of its own, scoring the same ids whenever it is told to.

Always true: it scores with the weights of the directory it is given, its prefix cache off, or on and empty before each
turn; a turn ends in one line with its seconds and its scores.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.asked import Asked


class PoolingPeer(Asked):
    """The process."""

    def __init__(self, directory: Path, sequences: Sequence[Sequence[int]], *, threads: int, shared: bool) -> None:
        settings = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads), "VLLM_CPU_KVCACHE_SPACE": "1",
        }  # fmt: skip
        super().__init__([sys.executable, "-m", "benchmarks.pooling_peer"], {**os.environ, **settings})
        self.ask(directory=str(directory), shared=shared, sequences=[list(sequence) for sequence in sequences])
        self.score()

    def score(self) -> tuple[float, list[float]]:
        """One turn: seconds and scores."""
        self.ask()
        told = self.answer()
        return float(told["seconds"]), list(told["scores"])


def main() -> None:
    """Load once; then a turn for every line."""
    from vllm import LLM
    from vllm.config import PoolerConfig

    _answer(imported=True)
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
        _answer(seconds=seconds, scores=[output.outputs.probs[0] for output in outputs])


def _answer(**told: Any) -> None:
    print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
