"""What verl's DPPO losses give: run in the environment of the independent implementations, without this project.

    python oracle_algorithms_verl.py DIRECTORY

Reads ``inputs.npz`` there (algorithms.prepare wrote it) and writes ``values.npz`` and ``versions.json``. It cuts ratios at 20
where nothing else is said, which no number here reaches.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import verl_source

LOSSES: dict[str, tuple[str, dict[str, float], str]] = {
    "tv": ("dppo_tv", {"clip_ratio": 0.05}, "token-mean"),
    "tv, wider above": ("dppo_tv", {"clip_ratio": 0.02, "clip_ratio_high": 0.06}, "token-mean"),
    "tv, cut ratios": ("dppo_tv", {"clip_ratio": 0.05, "clip_ratio_c": 1.1}, "token-mean"),
    "tv, mean of answers": ("dppo_tv", {"clip_ratio": 0.05}, "seq-mean-token-mean"),
    "kl": ("dppo_kl", {"clip_ratio": 0.01}, "token-mean"),
    "kl, wider above": ("dppo_kl", {"clip_ratio": 0.002, "clip_ratio_high": 0.02}, "token-mean"),
    "kl, constant": ("dppo_kl", {"clip_ratio": 0.01}, "seq-mean-token-sum-norm"),
    "kl, corrected": ("dppo_kl", {"clip_ratio": 0.01}, "token-mean"),
}


class Config(dict[str, float]):
    """As the losses read their settings: as attributes, None where there is none, and by ``get``."""

    global_batch_info: dict[str, Any] = {}  # noqa: RUF012

    def __getattr__(self, name: str) -> float | None:
        return self.get(name)


def main(directory: Path) -> None:
    with np.load(directory / "inputs.npz") as arrays:
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    mask = (torch.arange(inputs["log_probs"].shape[1]) < inputs["lengths"][:, None]).float()
    corrections = (inputs["old_log_probs"] - inputs["rollout_log_probs"]).exp().clamp(0.8, 1.25)
    core, values = verl_source.core_algos(), {}
    for name, (loss, settings, aggregation) in LOSSES.items():
        x = inputs["log_probs"].clone().requires_grad_()
        weights = corrections if name.endswith("corrected") else None
        value, metrics = core.get_policy_loss_fn(loss)(
            inputs["old_log_probs"], x, inputs["advantages"], mask, aggregation, Config(settings), weights
        )
        value.backward()
        clipped = torch.tensor(metrics["actor/pg_clipfrac"])
        values |= {f"{name}/loss": value.detach(), f"{name}/gradient": x.grad, f"{name}/clipped": clipped}
    np.savez(directory / "values.npz", **{name: value.float().numpy() for name, value in values.items()})
    (directory / "versions.json").write_text(json.dumps({"verl": "0.9.1", "torch": version("torch")}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
