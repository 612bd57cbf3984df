"""The head of a reward model or critic: a linear layer that computes one number from a hidden state.

Invariants: the product is computed in fp32 whatever the dtype of the model and the weight, since bf16 numbers near 5 lie
0.031 apart, so that different answers would get equal scores. The same seed gives the same fresh head.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from rlhf_ray.errors import ModelLoadError
from rlhf_ray.models.weights.adapters import HEADS, read_adapter
from rlhf_ray.models.weights.checkpoint import HEAD_NAME, Checkpoint

HeadInit = Literal["hf", "inv_sqrt", "inv", "zero"]
HEAD_INITS: tuple[HeadInit, ...] = ("hf", "inv_sqrt", "inv", "zero")
KNOWN_NAMES = (HEAD_NAME, "value_head", "v_head.summary")
"""Names that a head may have on disk: of transformers and this project, of older OpenRLHF, and of TRL's value-head models."""


class ScoreHead(nn.Linear):
    """A linear layer with one output and no bias, in fp32."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, 1, bias=False, dtype=torch.float32)

    def forward(self, hidden: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens"]:
        """Return the product of each hidden state with the weight."""
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(hidden.float(), self.weight.float())[..., 0]


def fresh_head(hidden: int, init: HeadInit, *, initializer_range: float, seed: int) -> ScoreHead:
    """Make a head with normally distributed weights, drawn from ``seed``.

    Their standard deviation is ``initializer_range`` for ``hf``, 1/sqrt(hidden + 1) for ``inv_sqrt`` (Stiennon et al. 2020,
    arXiv:2009.01325), 1/(hidden + 1) for ``inv``, and 0 for ``zero``.
    """
    deviation = {"hf": initializer_range, "inv_sqrt": (hidden + 1) ** -0.5, "inv": 1 / (hidden + 1), "zero": 0.0}
    if init not in deviation:
        raise ModelLoadError(f"unknown head_init {init!r}: choose one of {', '.join(HEAD_INITS)}")
    head = ScoreHead(hidden)
    generator = torch.Generator().manual_seed(seed)
    head.weight.data.copy_(torch.randn(1, hidden, generator=generator) * deviation[init])
    return head


def find_head(checkpoint: Checkpoint, prefix: str) -> str | None:
    """Return the name of the head in the checkpoint: ``prefix`` or else a known name; None if it has no head."""
    for candidate in (prefix, *KNOWN_NAMES):
        if f"{candidate}.weight" in checkpoint.names:
            return candidate
    return None


def read_head(checkpoint: Checkpoint, name: str, hidden: int) -> tuple[ScoreHead, float]:
    """Read the head called ``name`` and its bias (0 if it has none)."""
    weight = checkpoint.read(f"{name}.weight")
    check_head(weight, f"{name}.weight", checkpoint.directory, hidden)
    head = ScoreHead(hidden)
    head.weight.data.copy_(weight)
    bias = float(checkpoint.read(f"{name}.bias").float()) if f"{name}.bias" in checkpoint.names else 0.0
    return head, bias


def adapter_head_name(directory: Path) -> str | None:
    """Return the name of the head that lies beside an adapter, or None if there is none."""
    return next(iter(HEADS & read_adapter(directory).keys()), None)


def read_adapter_head(directory: Path, hidden: int) -> ScoreHead:
    """Read the head that lies beside an adapter."""
    name = adapter_head_name(directory)
    assert name is not None
    weight = read_adapter(directory)[name]
    check_head(weight, name, directory, hidden)
    head = ScoreHead(hidden)
    head.weight.data.copy_(weight)
    return head


def check_head(weight: Tensor, name: str, directory: Path, hidden: int) -> None:
    """Refuse a weight that does not map ``hidden`` features to one number."""
    if weight.shape[0] != 1:
        raise ModelLoadError(
            f"the head {name} of {directory} has {weight.shape[0]} outputs (num_labels), "
            "but a reward model or critic needs 1: choose another checkpoint, or ask for a fresh head"
        )
    if weight.shape[1] != hidden:
        raise ModelLoadError(
            f"the head {name} of {directory} reads {weight.shape[1]} features, but the "
            f"model has {hidden}: the checkpoint mixes files of different models"
        )


def head_tensors(checkpoint: Checkpoint) -> set[str]:
    """Return the names of all tensors of the checkpoint that belong to a head."""
    names = {f"{name}.{part}" for name in KNOWN_NAMES for part in ("weight", "bias")}
    return names & set(checkpoint.names)
