"""What vLLM's pooling runner reads out of reward models. Usage: pooling_program.py INPUTS OUTPUTS

INPUTS is a JSON file with ``directories`` and ``sequences``; OUTPUTS gets the raw scores by directory.
"""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

from rlhf_ray import environment


def main(inputs: Path, outputs: Path) -> None:
    environment.prepare()
    warnings.simplefilter("ignore")
    from vllm import LLM
    from vllm.config import PoolerConfig

    wanted, scores = json.loads(inputs.read_text()), {}
    prompts = [{"prompt_token_ids": sequence} for sequence in wanted["sequences"]]
    for directory in wanted["directories"]:
        model = LLM(
            directory,
            runner="pooling",
            dtype="float32",
            enforce_eager=True,
            max_model_len=64,
            kv_cache_memory_bytes=2**26,
            enable_prefix_caching=False,
            pooler_config=PoolerConfig(use_activation=False),  # raw scores instead of a sigmoid of them
        )
        scores[directory] = [output.outputs.probs[0] for output in model.classify(prompts, use_tqdm=False)]
        del model
    outputs.write_text(json.dumps(scores))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
