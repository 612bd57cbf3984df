"""What OpenRLHF's reward and critic classes read out of a directory: run in the environment of the independent
implementations, without this project.

    python oracle_openrlhf_models.py DIRECTORY

Reads ``inputs.json`` and the models there (openrlhf_models.prepare wrote them) and writes ``values.npz`` and ``versions.json``.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import openrlhf_source
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel


def load(directory: Path, kind: str, normalize: bool) -> Any:
    """As ``get_llm_for_sequence_regression`` does, which knows half precision only: no weight may be missing."""
    source = openrlhf_source.module("models.model")
    config = AutoConfig.from_pretrained(directory)
    config.normalize_reward, config._attn_implementation = normalize, "sdpa"
    base = AutoModel._model_mapping[type(config)]
    make = {"reward": source._get_reward_model, "critic": source._get_critic_model}[kind]
    model = make(base.__base__, base, config.value_head_prefix)
    loaded, info = model.from_pretrained(directory, config=config, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise SystemExit(f"{directory.name} as {kind}: {info}")
    # What its constructor sets is lost when transformers 5 loads it: these two are uninitialised memory, filled again here.
    loaded.mean[0], loaded.std[0] = config.mean, config.std
    return loaded.eval()


@torch.no_grad()
def values_of(directory: Path, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Scores and values of both paddings, and what a directory that OpenRLHF writes holds."""
    values: dict[str, torch.Tensor] = {}
    for side, batch in inputs["batches"].items():
        ids, mask, action_mask = (torch.tensor(batch[name]) for name in ("ids", "mask", "action_mask"))
        for normalize in (False, True):
            name = f"{side}, {'normalised' if normalize else 'raw'}"
            values[f"scores, {name}"] = load(directory, "reward", normalize)(ids, mask)
            values[f"values, {name}"] = load(directory, "critic", normalize)(ids, action_mask, mask)
    load(directory, "reward", False).save_pretrained(directory / "again")
    for name, tensor in load_file(directory / "again" / "model.safetensors").items():
        values[f"written/{name}"] = tensor.sum()[None]
    return values


def main(directory: Path) -> None:
    inputs = json.loads((directory / "inputs.json").read_text())
    values = {
        f"{case}/{name}": value.numpy()
        for case in inputs["cases"]
        for name, value in values_of(directory / case, inputs).items()
    }
    np.savez(directory / "values.npz", **values)
    versions = {name: version(name) for name in ("transformers", "torch")} | {"openrlhf": "0.11.2"}
    (directory / "versions.json").write_text(json.dumps(versions))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
