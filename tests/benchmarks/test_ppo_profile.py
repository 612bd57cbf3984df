"""The profile of a PPO step counts every phase and process once, and the products of the models that run."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.peers.ppo_material import PROMPT_TOKENS, SIZES
from benchmarks.ppo import NEW_TOKENS, PHASES, SAMPLES, Measured, products, profile


def test_the_products_are_those_of_the_matrices_of_the_model() -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZES))
    layers = sum(parameter.numel() for parameter in model.model.layers.parameters() if parameter.dim() > 1)
    head = model.lm_head.weight.numel()
    tokens, new = SAMPLES * (PROMPT_TOKENS + NEW_TOKENS), SAMPLES * NEW_TOKENS
    # Sampling; log-probs of the reference; an update of the policy.
    language = (1 + 1 + 3) * (layers * tokens + head * new)
    # The reward's scores; values; an update of the critic.
    scalar = (1 + 1 + 3) * layers * tokens
    assert products() == 2.0 * (language + scalar)


def test_phases_and_processes_are_shares_of_the_step() -> None:
    step = {f"time/{name}": 1.0 for name in PHASES} | {"time/step": 5.5}
    figures = profile(Measured([step, step], {"policy": 4.0, "driver": 1.5}), roof=2.2)
    values = {name.removeprefix("ppo."): figure.value for name, figure in figures.items()}
    assert values["phases_share"] == pytest.approx(5 / 5.5)
    assert values["busy_share"] == pytest.approx(5.5 / (2 * 5.5))
    assert values["share_of_roof"] == pytest.approx(0.4)
    assert values["processor_seconds.policy"] == 4.0 and values["update_seconds"] == 1.0


def test_what_is_said_of_a_figure_is_how_it_was_computed() -> None:
    """Processor seconds are means, so they are compared with the mean step."""
    steps = [{f"time/{name}": 1.0 for name in PHASES} | {"time/step": seconds} for seconds in (5.0, 5.0, 11.0)]
    figures = profile(Measured(steps, {"policy": 7.0}), roof=2.0)
    assert figures["ppo.step_seconds"].value == 5.0 and figures["ppo.busy_share"].value == pytest.approx(0.5)
    means = {name for name, figure in figures.items() if "mean of 3" in figure.method}
    assert means == {"ppo.processor_seconds.policy", "ppo.busy_share"}
    assert {name for name, figure in figures.items() if "median of 3" in figure.method} == figures.keys() - means
