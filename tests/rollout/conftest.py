"""Small random Llamas on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from rlhf_ray.rollout.wire import PublishedWeights, publish

from .llamas import make_llama


@pytest.fixture(scope="session")
def save_llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[LlamaForCausalLM, Path]]:
    """``save_llama(seed, tied=...)`` makes a model and writes it as the policy group would."""

    def save(seed: int, *, tied: bool = False, dtype: torch.dtype = torch.float32) -> tuple[LlamaForCausalLM, Path]:
        model = make_llama(seed, tied=tied).to(dtype)
        directory = tmp_path_factory.mktemp(f"llama{seed}")
        model.save_pretrained(directory)
        return model, directory

    return save


@pytest.fixture(scope="module")
def model_and_directory(save_llama: Callable[..., tuple[LlamaForCausalLM, Path]]) -> tuple[LlamaForCausalLM, Path]:
    """The model of a fleet's engines, and where it lies."""
    return save_llama(0)


@pytest.fixture(scope="module")
def weights(model_and_directory: tuple[LlamaForCausalLM, Path]) -> PublishedWeights:
    """The first publication of that model's weights."""
    return publish(1, model_and_directory[0].named_parameters())
