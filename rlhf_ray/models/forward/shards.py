"""Whether a model lies in shards: under ZeRO-3 each rank holds only a part of every parameter."""

from __future__ import annotations

from torch import nn


def in_shards(model: nn.Module) -> bool:
    """Return whether ZeRO-3 has split the parameters of ``model`` over the ranks: DeepSpeed marks each with an id."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())
