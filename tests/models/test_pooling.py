"""vLLM's pooling runner reads what is written here with equal raw scores, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rlhf_ray.models.regression_loading import get_llm_for_sequence_regression
from rlhf_ray.models.save import save_pretrained

from .conftest import random_model, word_tokenizer

pytestmark = pytest.mark.early

PROGRAM = Path(__file__).with_name("pooling_program.py")
FAMILIES = ("mixtral", "llama", "gemma2")
"""vLLM makes the groups of experts only with its first model. qwen3, qwen3-moe, olmoe and olmo2 agree as well (2e-6), and
take longer to start.
"""
SERVED = {"hidden_size": 128, "head_dim": 32}
"""A size of heads that vLLM has on CPU."""


def test_raw_scores_are_equal(tmp_path: Path, sequences: list[Tensor]) -> None:
    expected = {}
    for family in FAMILIES:
        random_model(family, **SERVED).save_pretrained(tmp_path / "base")
        reward = get_llm_for_sequence_regression(
            str(tmp_path / "base"), "reward", param_dtype="fp32", init_value_head=True
        ).eval()
        save_pretrained(reward, word_tokenizer(), tmp_path / family)
        expected[str(tmp_path / family)] = [float(reward(sequence[None]).detach()) for sequence in sequences]
    inputs = {"directories": list(expected), "sequences": [sequence.tolist() for sequence in sequences]}
    (tmp_path / "inputs.json").write_text(json.dumps(inputs))
    ended = subprocess.run(
        [sys.executable, PROGRAM, tmp_path / "inputs.json", tmp_path / "outputs.json"],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(PROGRAM.parents[2])},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert ended.returncode == 0, ended.stdout[-6000:]
    vllm_scores = json.loads((tmp_path / "outputs.json").read_text())
    for directory, scores in expected.items():
        assert max(map(abs, scores)) > 0.1
        torch.testing.assert_close(torch.tensor(vllm_scores[directory]), torch.tensor(scores), atol=1e-5, rtol=1e-5)
