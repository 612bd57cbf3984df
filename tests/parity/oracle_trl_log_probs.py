"""What TRL's log-probs and entropies are: run in the environment of the independent implementations, without this project.

    python oracle_trl_log_probs.py DIRECTORY

Reads ``inputs.npz`` there (trl_log_probs.prepare wrote it) and writes ``values.npz`` and ``versions.json``.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from trl.trainer.utils import entropy_from_logits, selective_log_softmax


def values_at(temperature: float, inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Results from whole logits, and gradients by autograd."""
    hidden, layer = (inputs[name].clone().requires_grad_() for name in ("hidden", "layer"))
    logits = hidden @ layer.T
    log_probs = selective_log_softmax(logits, inputs["targets"], temperature=temperature)
    entropy = entropy_from_logits(logits / temperature)
    ((inputs["of log-probs"] * log_probs).sum() + (inputs["of entropy"] * entropy).sum()).backward()
    return {
        "log-probs": log_probs.detach(),
        "entropy": entropy.detach(),
        "hidden gradient": hidden.grad,
        "layer gradient": layer.grad,
    }


def main(directory: Path) -> None:
    with np.load(directory / "inputs.npz") as arrays:
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    values = {
        f"temperature {temperature:g}/{name}": value.numpy()
        for temperature in inputs["temperatures"].tolist()
        for name, value in values_at(temperature, inputs).items()
    }
    np.savez(directory / "values.npz", **values)
    (directory / "versions.json").write_text(json.dumps({name: version(name) for name in ("trl", "torch")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
