"""Counts the floating-point operations of a model over sequences of different lengths.

Invariant: only matrix products are counted (linear layers and causal attention), and only those that the sequences need:
not what is computed twice, nor what sharing a prefix saves. So the same work has the same number under every packing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class ComputeShape:
    """What decides the cost of a token: parameters of the linear layers, how many of them are trained, the number of
    layers, and the width of all heads of a layer together.
    """

    parameters: int
    trained: int
    layers: int
    width: int


def training_flops(shape: ComputeShape, lengths: Iterable[int]) -> float:
    """Operations of a forward and a backward pass over sequences of ``lengths`` tokens.

    Per token and parameter: 2 in the forward pass, 2 for the gradient of the input and, if the parameter is trained, 2 for
    its own gradient. Causal attention over ``L`` tokens: two products of ``2 * L^2 / 2 * width`` operations forward, and
    twice as many backward.
    """
    lengths = list(lengths)
    linear = (4.0 * shape.parameters + 2.0 * shape.trained) * sum(lengths)
    attention = 6.0 * shape.layers * shape.width * sum(length * length for length in lengths)
    return linear + attention
