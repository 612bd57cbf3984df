"""What a GPU engine asks vLLM for, and how it reads vLLM's answer, as far as vLLM's own types show it without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import EngineArgs, SamplingParams
from vllm.outputs import CompletionOutput, SamplingMask

from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.rollout.vllm_sampling.kept_sets import KeptInEngine, sampling_cuts

pytestmark = pytest.mark.vllm
VOCABULARY = 100


def output(token_ids: list[int], sets: list[list[int]]) -> CompletionOutput:
    return CompletionOutput(
        index=0, text="", token_ids=token_ids, cumulative_logprob=None, logprobs=None, sampling_mask=SamplingMask(sets)
    )


def test_sets_of_vllm_are_read_in_the_order_of_the_tokens() -> None:
    engine: Any = SimpleNamespace()  # nothing is asked of it: the sets come with the answer
    sets = [[5], list(range(40)), list(range(VOCABULARY))]
    kept = KeptInEngine(engine, vocabulary=VOCABULARY, on_cpu=False).take("0", output([5, 39, 99], sets), greedy=False)
    mask = torch.zeros(3, VOCABULARY, dtype=torch.bool)
    for row, own in enumerate(sets):
        mask[row, own] = True
    assert torch.equal(kept.mask(VOCABULARY), mask)


@pytest.mark.parametrize("sets", [[[5]], [[5], [6]]])
def test_a_set_that_is_missing_or_lacks_its_token_is_refused(sets: list[list[int]]) -> None:
    engine: Any = SimpleNamespace()
    with pytest.raises(ValueError, match=f"vLLM gave {len(sets)} sets for 2 tokens"):
        KeptInEngine(engine, vocabulary=VOCABULARY, on_cpu=False).take("0", output([5, 7], sets), greedy=False)


def test_every_request_of_a_gpu_engine_has_a_temperature_and_a_top_k_as_vllm_demands() -> None:
    config = RolloutConfig(top_p=0.9, top_k=50, min_p=0.01, temperature=0.7)
    assert "return_sampling_mask" in EngineArgs.__dataclass_fields__
    drawn, greedy = (SamplingParams(**sampling_cuts(config, greedy=greedy, on_cpu=False)) for greedy in (False, True))
    assert (drawn.temperature, drawn.top_k, drawn.top_p, drawn.min_p) == (0.7, 50, 0.9, 0.01)
    assert greedy.temperature > 0 and greedy.top_k == 1
    on_cpu = SamplingParams(**sampling_cuts(config, greedy=True, on_cpu=True))
    assert on_cpu.temperature == 0.0
