"""vLLM's own offline generation, in turns: the peer of the part ``generate``.

    python -m benchmarks.peers.vllm_offline EAGER

An order names the requests: the ids of prompts, and how they are sampled. The answer says how long ``LLM.generate`` took for
all of them, and how many tokens it gave.
"""

from __future__ import annotations

import json
import sys
import time


def main() -> None:
    """Load what the first order names, and generate for every order."""
    from vllm import LLM, SamplingParams

    print(json.dumps({"imported": True}), flush=True)
    engine = None
    for line in sys.stdin:
        order = json.loads(line)
        if engine is None:
            engine = LLM(**order["engine"], skip_tokenizer_init=True, enforce_eager=sys.argv[1] == "eager")
        prompts = [{"prompt_token_ids": ids} for ids in order["prompts"]]
        began = time.monotonic()
        outputs = engine.generate(prompts, SamplingParams(**order["sampling"]), use_tqdm=False)
        seconds = time.monotonic() - began
        tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
        print(json.dumps({"seconds": seconds, "tokens": tokens}), flush=True)


if __name__ == "__main__":
    main()
