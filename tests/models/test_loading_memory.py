"""Under ZeRO-3 a rank that loads never holds much more than its share of the model, and waits for others as long as told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MixtralConfig, PreTrainedConfig

from .conftest import run_ranks, save_random, word_tokenizer
from .loading_program import COLLECTIVE_TIMEOUT_S

pytestmark = pytest.mark.early

PROGRAM = Path(__file__).with_name("loading_program.py")
BAR = 0.6
"""Of the model's size, for two ranks: half of it is theirs."""

SIZES = {
    "vocab_size": 4096, "hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "pad_token_id": 0,
    "eos_token_id": 2, "max_position_embeddings": 128,
}  # fmt: skip
LARGE: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES, intermediate_size=2048, num_hidden_layers=24),
    "mixtral": lambda: MixtralConfig(**SIZES, intermediate_size=512, num_hidden_layers=24, num_local_experts=4),
}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The folder of the models, and what both ranks measured."""
    directory = tmp_path_factory.mktemp("large")
    for family, config in LARGE.items():
        save_random(family, directory / f"{family} tiny")
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config(), dtype=torch.bfloat16)
        model.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(0.01)
        model.save_pretrained(directory / family)
        for name in (family, f"{family} tiny"):
            word_tokenizer().save_pretrained(directory / name)
    return directory, run_ranks(PROGRAM, directory)


@pytest.fixture(scope="module")
def shares(loaded: tuple[Path, list[dict[str, Any]]]) -> dict[str, list[float]]:
    """Peaks of both ranks, as a part of the model's size, by family."""
    directory, peaks = loaded
    sizes = {
        family: sum(file.stat().st_size for file in (directory / family).glob("*.safetensors")) for family in LARGE
    }
    return {family: [rank[family] / size for rank in peaks] for family, size in sizes.items()}


@pytest.mark.parametrize("family", LARGE)
def test_the_peak_of_a_rank_stays_near_its_share(shares: dict[str, list[float]], family: str) -> None:
    """Anonymous memory above the imported process, through the worker of a role; the file is mapped, and not counted."""
    print(f"{family}: {shares[family]}")
    assert all(0.4 < share < BAR for share in shares[family])


def test_every_collective_has_the_deadline_that_the_ranks_were_given(loaded: tuple[Path, list[dict[str, Any]]]) -> None:
    """In the ranks' own group, in DeepSpeed's, and where they exchange addresses."""
    assert [rank["timeouts"] for rank in loaded[1]] == [[COLLECTIVE_TIMEOUT_S] * 3] * 2
