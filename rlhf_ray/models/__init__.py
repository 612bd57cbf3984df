"""Policies, reward models and critics: load or make them, run them on packs of sequences, and save them.

Invariant: importing this package imports neither torch nor any of its own modules; each public name imports what it needs
when it is first used.
"""

from __future__ import annotations

from rlhf_ray.lazy import lazy_exports

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "Actor": ".actor",
        "PackedPolicy": ".actor",
        "PackedRegression": ".regression",
        "SequenceRegression": ".regression",
        "describe": ".description",
        "get_llm_for_sequence_regression": ".regression_loading",
        "load_end_tokens": ".weights.tokenizer",
        "load_policy": ".from_config",
        "load_regression": ".from_config",
        "load_reward_reading": ".reward_reading",
        "load_tokenizer": ".weights.tokenizer",
        "make_model": ".weights.tiny_llama",
        "packed_forward": ".forward.packed",
        "prepare_padding": ".weights.tokenizer",
        "save_adapter": ".save",
        "save_pretrained": ".save",
        "save_without_weights": ".save",
    },
)
