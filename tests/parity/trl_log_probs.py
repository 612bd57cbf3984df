"""Log-probs, entropies and their gradients against TRL's functions, from the same hidden states and output layer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from rlhf_ray.models.forward.log_probs import LogProbHead

TOKENS, HIDDEN, VOCABULARY = 24, 8, 40
TEMPERATURES = [1.0, 0.7]


def make_inputs(seed: int = 21) -> dict[str, Any]:
    """Hidden states, an output layer, targets, and what each result weighs in the number whose gradient is taken."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "hidden": (TOKENS, HIDDEN), "layer": (VOCABULARY, HIDDEN), "of log-probs": (TOKENS,), "of entropy": (TOKENS,),
    }  # fmt: skip
    tensors = {name: (0.5 * torch.randn(shape, generator=generator)).numpy() for name, shape in shapes.items()}
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator).tolist()
    return {"seed": seed, "temperatures": TEMPERATURES, "targets": targets, **tensors}


def prepare(inputs: Mapping[str, Any], directory: Path) -> None:
    """What the oracle reads."""
    np.savez(directory / "inputs.npz", **{name: value for name, value in inputs.items() if name != "seed"})


def ours(inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """What this project's output layer gives at every temperature."""
    values = {}
    weights = [torch.from_numpy(inputs[name]) for name in ("of log-probs", "of entropy")]
    for temperature in inputs["temperatures"]:
        hidden = torch.from_numpy(inputs["hidden"]).clone().requires_grad_()
        layer = nn.Linear(*inputs["layer"].T.shape, bias=False)
        layer.weight.data = torch.from_numpy(inputs["layer"]).clone()
        head = LogProbHead.around(layer, softcap=None)
        results = head(hidden, torch.tensor(inputs["targets"]), temperature, with_entropy=True)
        sum((weight * result).sum() for weight, result in zip(weights, results, strict=True)).backward()
        named = {"log-probs": results[0], "entropy": results[1], "hidden gradient": hidden.grad,
                 "layer gradient": layer.weight.grad}  # fmt: skip
        values |= {f"temperature {temperature:g}/{name}": value.detach().numpy() for name, value in named.items()}
    return values
