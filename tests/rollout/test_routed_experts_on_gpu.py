"""How an engine on a GPU reads vLLM's own ``routed_experts``, as far as vLLM's types show it without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm import EngineArgs
from vllm.outputs import CompletionOutput

from rlhf_ray.errors import RequestError
from rlhf_ray.rollout.vllm_sampling.routed_experts import RoutedInEngine

pytestmark = pytest.mark.vllm
LAYERS = [1, 3]
"""With a router; the others are dense, and vLLM writes zeros there."""


def engine_of(experts: int) -> RoutedInEngine:
    engine: Any = SimpleNamespace(collective_rpc=lambda method: [(LAYERS, experts)])
    return RoutedInEngine(engine, on_cpu=False)


def output(experts: np.ndarray) -> CompletionOutput:
    return CompletionOutput(
        index=0, text="", token_ids=[7, 8], cumulative_logprob=None, logprobs=None, routed_experts=experts
    )


@pytest.mark.parametrize(
    ("experts", "given", "kept"), [(255, "uint8", "uint8"), (256, "uint8", "int16"), (400, "uint16", "int16")]
)
def test_the_rows_of_layers_with_a_router_are_taken_for_all_tokens_but_the_last(
    experts: int, given: str, kept: str
) -> None:
    assert "enable_return_routed_experts" in EngineArgs.__dataclass_fields__
    rows = np.zeros((4, 5, 2), given)
    rows[:, LAYERS] = np.arange(16).reshape(4, 2, 2) + experts - 16
    found = engine_of(experts).take("0", output(rows), prompt=[5, 6, 7])
    assert found.dtype == kept and (found == rows[:, LAYERS]).all()


def test_experts_of_fewer_tokens_than_were_read_are_refused() -> None:
    with pytest.raises(ValueError, match="the experts of 3 tokens, but it read 4"):
        engine_of(8).take("0", output(np.zeros((3, 5, 2), np.uint8)), prompt=[5, 6, 7])
    dense: Any = SimpleNamespace(collective_rpc=lambda method: [([], 0)])
    with pytest.raises(RequestError, match="is true, but vLLM finds no router in this model: set it to false"):
        RoutedInEngine(dense, on_cpu=False)
