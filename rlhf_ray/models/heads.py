"""The head of a reward model or critic: a linear layer, or a small MLP, that computes one number from a hidden state.

Invariants: the product is computed in fp32 whatever the dtype of the model and the weight, since bf16 numbers near 5 lie
0.031 apart, so that different answers would get equal scores. The same seed gives the same fresh head.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from rlhf_ray.errors import ModelLoadError

HeadInit = Literal["hf", "inv_sqrt", "inv", "zero"]
HEAD_INITS: tuple[HeadInit, ...] = ("hf", "inv_sqrt", "inv", "zero")


class ScoreHead(nn.Linear):
    """A linear layer with one output and no bias, in fp32."""

    def __init__(self, hidden: int) -> None:
        super().__init__(hidden, 1, bias=False, dtype=torch.float32)

    def forward(self, hidden: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens"]:
        """Return the product of each hidden state with the weight."""
        return _linear_in_fp32(self, hidden)[..., 0]


class MlpLayer(nn.Linear):
    """A linear layer that computes in fp32."""

    def forward(self, features: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        """Return the product of each row with the weight, plus the bias if there is one."""
        return _linear_in_fp32(self, features)


class MlpHead(nn.Sequential):
    """Linear layers with a ReLU between each two, the last with one output, in fp32.

    Its parameters are called ``0.weight``, ``2.weight`` and so on, as in the directories of Qwen2.5-Math-RM, GRM and INF-ORM.
    """

    def __init__(self, widths: tuple[int, ...], biases: tuple[bool, ...]) -> None:
        """``widths`` are the features that each layer reads; ``biases`` says which layers have one."""
        modules: list[nn.Module] = []
        for (wide, narrow), bias in zip(pairwise((*widths, 1)), biases, strict=True):
            modules += [MlpLayer(wide, narrow, bias=bias, dtype=torch.float32), nn.ReLU()]
        super().__init__(*modules[:-1])

    def forward(self, hidden: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens"]:
        """Return one number for each hidden state."""
        features = hidden
        for module in self:
            features = module(features)
        return features[..., 0]


Head = ScoreHead | MlpHead


def _linear_in_fp32(layer: nn.Linear, features: Tensor) -> Tensor:
    with torch.autocast(features.device.type, enabled=False):
        bias = None if layer.bias is None else layer.bias.float()
        return functional.linear(features.float(), layer.weight.float(), bias)


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
