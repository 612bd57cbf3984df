"""A model built in shards gives the numbers of the whole one; ranks with other numbers of chunks do not wait for ever."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf_ray.models.actor import Actor, PackedPolicy
from rlhf_ray.models.regression import PackedRegression, get_llm_for_sequence_regression
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.packing import pack

PROGRAM = Path(__file__).with_name("sharded_program.py")


def run_ranks(directory: Path) -> list[dict[str, Any]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join([str(PROGRAM.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), str(rank), str(port), str(directory)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=240)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)[-6000:]
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    from transformers import AutoModelForCausalLM

    from .conftest import FAMILIES

    directory = tmp_path_factory.mktemp("sharded")
    for family in ("llama", "gemma2", "mixtral", "misshapen"):
        torch.manual_seed(0)
        config = FAMILIES["llama" if family == "misshapen" else family]()
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory / family)
    weights = load_file(directory / "misshapen" / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(7)
    save_file(weights, directory / "misshapen" / "model.safetensors", {"format": "pt"})
    return directory, run_ranks(directory)


def test_numbers_are_those_of_the_whole_model(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    directory, ranks = measured
    for family in ("llama", "gemma2"):
        actor = Actor(str(directory / family), param_dtype="fp32")
        reward = get_llm_for_sequence_regression(
            str(directory / family), "reward", param_dtype="fp32", init_value_head=True, seed=3
        ).eval()
        for rank in ranks:
            ids, offsets = (torch.tensor(numbers) for numbers in rank["tokens"])
            batch = TrajectoryBatch(offsets, {"token_ids": ids})
            log_probs = PackedPolicy(actor)(pack(batch)).log_probs
            torch.testing.assert_close(torch.tensor(rank[f"{family} log_probs"]), log_probs, atol=1e-5, rtol=1e-5)
            scores = PackedRegression(reward)(pack(batch), "scores")
            torch.testing.assert_close(torch.tensor(rank[f"{family} scores"]), scores, atol=1e-5, rtol=1e-5)


def test_no_rank_holds_the_whole(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    whole = Actor(str(measured[0] / "llama"), param_dtype="fp32")
    count = sum(parameter.numel() for parameter in whole.parameters())
    for rank in measured[1]:
        assert rank["llama share"] == pytest.approx(0.5, abs=0.01)
        assert f"{count / 1000:.3g}k parameters" in rank["llama report"]


def test_what_is_written_from_shards_is_the_checkpoint(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    """Gathered layer by layer, under the names on disk; gemma2 was written last, with tied embeddings."""
    written, original = (load_file(measured[0] / name / "model.safetensors") for name in ("saved", "gemma2"))
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], original[name]) for name in original)


def test_what_cannot_be_built_in_shards_is_refused(measured: tuple[Path, list[dict[str, Any]]]) -> None:
    for rank in measured[1]:
        mixture, misshapen = rank["refused"]
        assert "MixtralForCausalLM" in mixture and "mixture of experts" in mixture
        assert "model.norm.weight" in misshapen and "(7,)" in misshapen
