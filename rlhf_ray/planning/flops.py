"""Floating-point operations of a model over ragged sequences.

Always true: what is counted is matrix products alone (linear layers and causal attention), of the sequences as they are,
whatever is computed twice, shared or left out because nothing reads it; so the same work has the same number under every
packing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ComputeShape:
    """What a token costs: parameters of the linear layers, how many of them are trained, layers, and the width of all heads
    of a layer together.
    """

    parameters: int
    trained: int
    layers: int
    width: int


def training_flops(shape: ComputeShape, lengths: Iterable[int]) -> float:
    """Forward and backward: 2 for a parameter and token each in the forward, for its input's gradient and, where it is
    trained, for its own; and for causal attention 2 products of ``2 L^2 / 2 * width`` forward and twice that backward.
    """
    lengths = list(lengths)
    linear = (4.0 * shape.parameters + 2.0 * shape.trained) * sum(lengths)
    attention = 6.0 * shape.layers * shape.width * sum(length * length for length in lengths)
    return linear + attention
