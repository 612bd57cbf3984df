"""The head of reward models and critics: one number from a hidden state.

Always true: the product is computed in fp32 whatever the dtype of model and weight (bf16 numbers near 5 are 0.031
apart, which costs ties); a head comes from the checkpoint or was asked for, and then the same seed gives the same
head.
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
OTHER_LAYOUTS = (HEAD_NAME, "value_head", "v_head.summary")
"""Where else a head may lie: transformers and this project; OpenRLHF's older default; TRL's value-head models."""


class ScoreHead(nn.Linear):
    """Linear to one output, without bias, in fp32: (tokens, hidden) to (tokens,)."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, 1, bias=False, dtype=torch.float32)

    def forward(self, hidden: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens"]:
        """Return ``h w`` for each hidden state."""
        with torch.autocast(hidden.device.type, enabled=False):
            return functional.linear(hidden.float(), self.weight.float())[..., 0]


def fresh_head(hidden: int, init: HeadInit, *, initializer_range: float, seed: int) -> ScoreHead:
    """Make a head: ``hf`` normal with the model's own deviation, ``inv_sqrt`` normal with 1/sqrt(hidden + 1)
    (Stiennon et al. 2020), ``inv`` normal with 1/(hidden + 1), or ``zero``.
    """
    deviation = {"hf": initializer_range, "inv_sqrt": (hidden + 1) ** -0.5, "inv": 1 / (hidden + 1), "zero": 0.0}
    if init not in deviation:
        raise ModelLoadError(f"unknown head_init {init!r}: choose one of {', '.join(HEAD_INITS)}")
    head = ScoreHead(hidden)
    generator = torch.Generator().manual_seed(seed)
    head.weight.data.copy_(torch.randn(1, hidden, generator=generator) * deviation[init])
    return head


def find_head(checkpoint: Checkpoint, prefix: str) -> str | None:
    """Name under which the checkpoint holds a head, the given prefix first."""
    for candidate in (prefix, *OTHER_LAYOUTS):
        if f"{candidate}.weight" in checkpoint.names:
            return candidate
    return None


def read_head(checkpoint: Checkpoint, name: str, hidden: int) -> tuple[ScoreHead, float]:
    """Read the head called ``name`` and its bias (0 without one)."""
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
    """Refuse a weight that is no head to one number over ``hidden`` features."""
    if weight.shape[0] != 1:
        raise ModelLoadError(
            f"the head {name} of {directory} has {weight.shape[0]} outputs (num_labels), "
            "but a reward model or critic needs 1: choose another checkpoint, or ask for a fresh head"
        )
    if weight.shape[1] != hidden:
        raise ModelLoadError(
            f"the head {name} of {directory} reads {weight.shape[1]} features, but the "
            f"model has {hidden}: the checkpoint is not of one piece"
        )


def head_tensors(checkpoint: Checkpoint) -> set[str]:
    """Names of all tensors of the checkpoint that are heads of a known layout."""
    layouts = {f"{layout}.{part}" for layout in OTHER_LAYOUTS for part in ("weight", "bias")}
    return layouts & set(checkpoint.names)
