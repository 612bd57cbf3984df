"""The products of one adapter on a CPU: those of the closed form and of vLLM, without a copy of the adapter for each token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from vllm.lora.layers import LoRAMapping
from vllm.lora.punica_wrapper import get_punica_wrapper
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

from rlhf_ray.rollout import weight_transfer
from rlhf_ray.rollout.weights.vllm_cpu_lora import OneAdapter

pytestmark = pytest.mark.vllm
TOKENS, RANK, INPUTS, SLICES = 6, 4, 32, (16, 8, 8)
SCALE = 0.5
CASES = {
    "one": [12] * TOKENS,
    "another": [11] * TOKENS,
    "both": [11, 11, 12, 12, 12, 11],
    "none": [0] * TOKENS,
}
"""The numbers of the adapters of each token; 12 lies in slot 0 and 11 in slot 1."""
ADAPTERS = [12, 11]


class Gathers(TorchDispatchMode):
    """Counts the operations that look weights up for each token."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.name().split(".")[0] in ("aten::index", "aten::index_select", "aten::repeat_interleave")
        return func(*args, **(kwargs or {}))


def material(dtype: torch.dtype) -> tuple[Tensor, Tensor, tuple[Tensor, ...], tuple[Tensor, ...]]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    down = tuple(drawn(2, 1, RANK, INPUTS) for _ in SLICES)
    return drawn(TOKENS, sum(SLICES)), drawn(TOKENS, INPUTS), down, tuple(drawn(2, 1, size, RANK) for size in SLICES)


def computed(wrapper: type[PunicaWrapperCPU], case: str, dtype: torch.dtype, prefill: bool) -> tuple[Tensor, int]:
    """What a layer gives, and how often weights were looked up for each token."""
    y, x, down, up = material(dtype)
    products = wrapper(64, 16, "cpu")
    tokens = CASES[case]
    mapping = LoRAMapping(tuple(tokens), tuple(tokens), is_prefill=prefill)
    products.update_metadata(mapping, ADAPTERS, len(ADAPTERS), 100)
    with Gathers() as gathers:
        products.add_lora_linear(y, x, down, up, SCALE, SLICES)
    return y, gathers.count


@pytest.mark.parametrize("prefill", [True, False], ids=["prefill", "decode"])
@pytest.mark.parametrize("case", ["one", "another"])
def test_all_tokens_of_one_adapter_are_computed_by_the_closed_form_without_a_copy_for_each(
    case: str, prefill: bool
) -> None:
    y, x, down, up = (part for part in material(torch.float32))
    slot = ADAPTERS.index(CASES[case][0])
    expected = y.double()
    added = [SCALE * x.double() @ a[slot, 0].double().T @ b[slot, 0].double().T for a, b in zip(down, up, strict=True)]
    expected += torch.cat(added, dim=1)
    found, gathers = computed(OneAdapter, case, torch.float32, prefill)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    assert gathers == 0, "the adapter is read where it lies"
    assert computed(PunicaWrapperCPU, case, torch.float32, prefill)[1] >= 2 * len(SLICES), "vLLM still copies it"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefill", [True, False], ids=["prefill", "decode"])
@pytest.mark.parametrize("case", CASES)
def test_the_products_are_vllms(case: str, prefill: bool, dtype: torch.dtype) -> None:
    ours, _ = computed(OneAdapter, case, dtype, prefill)
    theirs, _ = computed(PunicaWrapperCPU, case, dtype, prefill)
    if case in ("both", "none"):
        assert torch.equal(ours, theirs), "what is left to vLLM is vLLM's"
    elif dtype == torch.float32:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    else:  # they round the sum of the products once more
        torch.testing.assert_close(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_vllm_takes_these_products_once_weights_can_come() -> None:
    assert weight_transfer.BACKEND, "its import is what workers do first"
    assert isinstance(get_punica_wrapper(64, 16, "cpu"), OneAdapter)
