"""Data of a job, ready to be trained on: rows encoded as tokens, split into halves, and the order in which they are used.

Invariants: nothing here knows a model, an engine or a cluster; a row that is wrong is named by file and line.
"""

from __future__ import annotations

from rlhf_ray.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "PairExample": ".encoded_pairs",
        "PairFile": ".encoded_pairs",
        "Part": ".order",
        "ShuffledOrder": ".order",
        "ChatFormat": ".chat",
        "encode_answers": ".answer_ids",
        "encode_demonstrations": ".encode",
        "encode_pairs": ".encode",
        "encode_prompts": ".encode",
        "fingerprint": ".tokenizers",
        "hold_out": ".holdout",
        "make_tokenizer": ".tokenizers",
        "encode_pair_file": ".encoded_pairs",
    },
)
