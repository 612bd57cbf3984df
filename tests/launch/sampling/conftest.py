"""A small policy and a small reward model on disk, and files of prompts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf_ray.config.sections.models import MakeConfig, ModelConfig
from rlhf_ray.models import load_tokenizer, make_model, save_pretrained
from rlhf_ray.models.from_config import load_regression
from rlhf_ray.world.generate import World

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }} {% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
SMALL = ("rollout.backend=transformers", "rollout.dtype=fp32", "rollout.max_new_tokens=6", "cut_answers=keep")
"""Overrides for an engine in this process; a model with random weights seldom ends an answer."""


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy with random weights whose tokens are the words of the generated world."""
    torch.set_num_threads(1)
    tokenizer = load_tokenizer(ModelConfig(make=MakeConfig(shape="llama-tiny", tokenizer_from="world")))
    tokenizer.chat_template = CHAT_TEMPLATE
    model = make_model("llama-tiny", len(tokenizer), seed=1, eos_token_id=tokenizer.eos_token_id)
    directory = tmp_path_factory.mktemp("models") / "policy"
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model with random weights and a head that scores."""
    config = ModelConfig(
        make=MakeConfig(shape="llama-tiny", tokenizer_from="world"), head_init="inv_sqrt", dtype="fp32"
    )
    directory = tmp_path_factory.mktemp("models") / "reward"
    save_pretrained(load_regression(config, "reward", seed=4), load_tokenizer(config), directory)
    return directory


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[[int], Path]:
    """Makes a file of so many prompts of the generated world."""

    def write(count: int) -> Path:
        path = tmp_path / "prompts.jsonl"
        rows = [{"prompt": prompt.text} for prompt in World(3).prompts("ppo", count)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write
