"""Rows to train on: read from files or generated, tokenized, and the order in which they are used.

Always true: nothing here knows a model, an engine or a cluster, and a row that is wrong is told by file and line.
"""

from __future__ import annotations

from rlhf_ray.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Demonstration": "rlhf_ray.rows.demonstrations",
        "PairExample": ".encoded_pairs",
        "PairFile": ".encoded_pairs",
        "Part": ".order",
        "PreferencePair": "rlhf_ray.rows.preferences",
        "Prompt": "rlhf_ray.rows.prompts",
        "Row": "rlhf_ray.rows.read",
        "ShuffledOrder": ".order",
        "World": "rlhf_ray.world.generate",
        "encode_answers": ".encode",
        "encode_demonstration": ".encode",
        "encode_demonstrations": ".encode",
        "encode_pair": ".encode",
        "encode_pairs": ".encode",
        "encode_prompt": ".encode",
        "encode_prompts": ".encode",
        "fingerprint": ".tokenizers",
        "gold_score": "rlhf_ray.world.gold",
        "hold_out": ".holdout",
        "make_tokenizer": ".tokenizers",
        "pairs_of_file": ".encoded_pairs",
        "read_demonstrations": "rlhf_ray.rows.demonstrations",
        "read_preferences": "rlhf_ray.rows.preferences",
        "read_prompts": "rlhf_ray.rows.prompts",
        "read_rows": "rlhf_ray.rows.read",
    },
)
