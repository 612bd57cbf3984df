"""Rows to train on: read from files or generated, tokenized, and the order in which they are used.

Always true: nothing here knows a model, an engine or a cluster, and a row that is wrong is told by file and line.
"""

from __future__ import annotations

from rlhf_ray.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Demonstration": ".demonstrations",
        "PairExample": ".pairs",
        "PairFile": ".pairs",
        "Part": ".order",
        "PreferencePair": ".preferences",
        "Prompt": ".prompts",
        "Row": ".rows",
        "ShuffledOrder": ".order",
        "World": ".world",
        "encode_answers": ".encode",
        "encode_demonstration": ".encode",
        "encode_demonstrations": ".encode",
        "encode_pair": ".encode",
        "encode_pairs": ".encode",
        "encode_prompt": ".encode",
        "encode_prompts": ".encode",
        "fingerprint": ".tokenizers",
        "gold_score": ".world",
        "hold_out": ".holdout",
        "make_tokenizer": ".tokenizers",
        "pairs_of_file": ".pairs",
        "read_demonstrations": ".demonstrations",
        "read_preferences": ".preferences",
        "read_prompts": ".prompts",
        "read_rows": ".rows",
    },
)
