"""Score with vLLM's pooling runner, for comparison with the offline scorer.

Invariants: it scores in bf16 with the weights of the given directory. Its prefix cache is off, or on and empty before each
turn.
"""

from __future__ import annotations

import os
from typing import Any

from benchmarks.peers.scoring_peer import Score, take_turns

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_CPU_KVCACHE_SPACE": "1",
}  # fmt: skip


def load(order: dict[str, Any]) -> Score:
    """Load the model; ``shared`` in the order turns the prefix cache on."""
    from vllm import LLM
    from vllm.config import PoolerConfig

    prompts: Any = [{"prompt_token_ids": sequence} for sequence in order["sequences"]]
    model = LLM(
        order["directory"],
        runner="pooling",
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=2048,
        enable_prefix_caching=order["shared"],
        pooler_config=PoolerConfig(use_activation=False),
    )

    def score() -> list[float]:
        model.reset_prefix_cache()
        return [output.outputs.probs[0] for output in model.classify(prompts, use_tqdm=False)]

    return score


if __name__ == "__main__":
    take_turns(load)
