"""Small random models of several families, and a tokenizer, made on the spot."""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from beartype import beartype
from jaxtyping import jaxtyped
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MiniMaxM2Config,
    MixtralConfig,
    Olmo2Config,
    OlmoeConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3MoeConfig,
)

from rlhf_ray.models import forward
from rlhf_ray.trajectories.packing import Packed

VOCABULARY = 48
LENGTHS = (7, 3, 12, 1, 12, 20, 5)
"""Longer than the sliding window of 5, and shorter; a segment of one token; two of one length."""

SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip

FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "qwen3": lambda: Qwen3Config(**SIZES, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "gemma2": lambda: Gemma2Config(**SIZES, sliding_window=5, query_pre_attn_scalar=8),
    "gemma3": lambda: Gemma3TextConfig(
        **{**SIZES, "num_hidden_layers": 3}, sliding_window=5, query_pre_attn_scalar=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2, sliding_window=5),
}  # fmt: skip
MORE_FAMILIES: dict[str, Callable[[], PreTrainedConfig]] = {
    "olmo2": lambda: Olmo2Config(**SIZES),
    "minimax-m2": lambda: MiniMaxM2Config(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": lambda: OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SIZES, moe_intermediate_size=24, num_experts=4, num_experts_per_tok=2),
}
ALL_FAMILIES = FAMILIES | MORE_FAMILIES


@pytest.fixture(scope="module", autouse=True)
def the_forward_pass_is_checked() -> Iterator[None]:
    """Every function of ``models.forward`` checks its arguments and result against its annotations, wherever it is called."""
    names = [module.name for module in pkgutil.iter_modules(forward.__path__, f"{forward.__name__}.")]
    functions = [
        function
        for name in names
        for function in vars(importlib.import_module(name)).values()
        if isinstance(function, FunctionType) and function.__module__ == name
    ]
    checked = {function: jaxtyped(function, typechecker=beartype) for function in functions}
    rooms = [module for name, module in list(sys.modules.items()) if name.startswith(("rlhf_ray.", "tests.models."))]
    with pytest.MonkeyPatch.context() as patch:
        for module in rooms:
            for name, value in list(vars(module).items()):
                if isinstance(value, FunctionType) and value in checked:
                    patch.setattr(module, name, checked[value])
        yield


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def causal() -> Callable[..., PreTrainedModel]:
    """A causal model of a family with transformers' own eager attention: ``causal(family, seed)``."""

    def make(family: str = "llama", seed: int = 0, **changes: object) -> PreTrainedModel:
        return random_model(family, seed, **changes)

    return make


def random_model(family: str, seed: int = 0, **changes: object) -> PreTrainedModel:
    config = ALL_FAMILIES[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        persistent = model.state_dict().keys()
        for name, buffer in model.named_buffers():
            if name in persistent:
                buffer.uniform_(0.5, 1.0)  # transformers makes all of them equal, so that a lost one would not be seen
        return model


def save_random(family: str, directory: Path, seed: int = 0) -> Path:
    random_model(family, seed).save_pretrained(directory)
    return directory


def run_ranks(program: Path, directory: Path, *, timeout_s: float = 240.0) -> list[Any]:
    """Run ``program`` (RANK PORT DIRECTORY) as two ranks, which end by the deadline; what they wrote, by rank."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    paths = os.pathsep.join([str(program.parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": paths}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(port), str(directory)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [process.communicate(timeout=timeout_s)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], "\n".join(outputs)[-6000:]
    return [json.loads((directory / f"rank{rank}.json").read_text()) for rank in range(2)]


def shake_adapters(model: nn.Module) -> None:
    """Fresh adapters change nothing: give them weights that do."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(name)))


@pytest.fixture
def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for length in LENGTHS]


def pack_sequences(sequences: list[Tensor]) -> Packed:
    offsets = torch.tensor([0, *(len(sequence) for sequence in sequences)]).cumsum(0)
    positions = torch.cat([torch.arange(len(sequence)) for sequence in sequences])
    return Packed(torch.cat(sequences), offsets, positions)


@pytest.fixture
def packed(sequences: list[Tensor]) -> Packed:
    return pack_sequences(sequences)


@pytest.fixture
def repack() -> Callable[[list[Tensor]], Packed]:
    return pack_sequences


@pytest.fixture
def pad() -> Callable[..., tuple[Tensor, Tensor]]:
    """Pad sequences on a side with an id; returns ids and attention mask."""

    def padded(sequences: list[Tensor], side: str = "right", pad_id: int = 0) -> tuple[Tensor, Tensor]:
        length = max(map(len, sequences))
        ids = torch.full((len(sequences), length), pad_id)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            part = slice(0, len(sequence)) if side == "right" else slice(length - len(sequence), length)
            ids[row, part], mask[row, part] = sequence, 1
        return ids, mask

    return padded


@pytest.fixture
def make_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    """A word-level tokenizer over ``w3 w4 ...`` with ``<pad> <s> </s>`` at 0, 1, 2."""

    return word_tokenizer


def word_tokenizer(size: int = VOCABULARY, *, pad: bool = True) -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", *(f"w{number}" for number in range(3, size))]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special, **({"pad_token": "<pad>"} if pad else {}))
