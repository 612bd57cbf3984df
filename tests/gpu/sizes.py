"""How large the checks are: as a user's models on a GPU, and tiny on a CPU, where the same script is rehearsed.

Always true: both have the same fields, so that no check asks which of them it runs with.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_ray.environment import Device


@dataclass(frozen=True)
class Sizes:
    """Sizes of all checks. Lengths and budgets are in tokens."""

    sequences: int
    """Of the agreement checks."""
    longest: int
    head_tokens: int
    head_vocabulary: int
    agreeing_tokens: int
    agreeing_vocabulary: int
    made: str
    """A model that this project makes, for checks that only compare."""
    small: str
    """A model of a user's small GPU, by its name in ``shapes``."""
    large: str
    large_layers: int | None
    """Layers of ``large`` that are trained in full; None for as many as fit."""
    batch: int
    """Sequences that the small model trains on or scores."""
    large_batch: int
    budget: int
    """Tokens of a pack."""
    repeats: int
    memory_sequences: int
    """Of a pack whose activations are measured."""
    published_layers: int | None
    """Layers of ``large`` whose weights are handed to another process; None for all."""
    published_mib: int
    """Size of a chunk of weights that is handed to another process."""


SIZES: dict[Device, Sizes] = {
    "cuda": Sizes(
        sequences=12, longest=300, head_tokens=16384, head_vocabulary=151936, agreeing_tokens=3000,
        agreeing_vocabulary=32000, made="llama-14m", small="qwen3-0.6b", large="qwen3-8b",
        large_layers=None, batch=512, large_batch=256,
        budget=16384, repeats=3, memory_sequences=64, published_layers=None, published_mib=256,
    ),
    "cpu": Sizes(
        sequences=4, longest=60, head_tokens=96, head_vocabulary=2048, agreeing_tokens=200,
        agreeing_vocabulary=2048, made="llama-tiny", small="tiny", large="tiny",
        large_layers=1, batch=4, large_batch=4, budget=600, repeats=1,
        memory_sequences=4, published_layers=2, published_mib=1,
    ),
}  # fmt: skip
