"""The products of a LoRA adapter in vLLM on a CPU, where vLLM 0.32 copies the adapter for every token.

Invariant: where all tokens of a step are computed with one adapter, each layer computes y += (x A^T s) B^T (Hu et al. 2021,
section 4.1) as two products with the adapter where it lies. Everything else is left to vLLM. As there, x A^T is computed and
kept in fp32, and multiplied with B in the dtype of y.

``PunicaWrapperCPU`` gathers A and B once for each token (``lora_b_weights[lora_indices_tensor]`` in
``vllm.lora.ops.torch_ops.lora_ops``), so that a prompt of 512 tokens copies an adapter 512 times. The engines of a rollout have
one adapter. A platform names the class of these products (``Platform.get_punica_wrapper``), and only a platform of one's
own can name another, so that name is replaced. ``tests/rollout/test_adapter.py`` fails when vLLM takes the class from
elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.platforms import current_platform


class OneAdapter(PunicaWrapperCPU):
    """Computes with one adapter for all tokens of a step, where they have the same."""

    slot: int | None = None
    """Where the one adapter of this step lies; None where tokens have several, or one has none."""

    def update_metadata(self, *arguments: Any, **named: Any) -> None:
        """Note which adapter each token of the coming step has."""
        super().update_metadata(*arguments, **named)
        slots = torch.unique(self.token_lora_indices).tolist()
        self.slot = slots[0] if len(slots) == 1 and slots[0] >= 0 else None

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: tuple[Tensor, ...],
        lora_b_stacked: tuple[Tensor, ...],
        scale: float,
        output_slices: tuple[int, ...],
        **more: Any,
    ) -> None:
        """Add the adapter's products to ``y``, (tokens, out) in place, for ``x``, (tokens, in).

        A is (slots, 1, rank, in) and B (slots, 1, out, rank), for each of the ``output_slices`` side by side in ``y``.
        """
        if self.slot is None or more:
            super().add_lora_linear(y, x, lora_a_stacked, lora_b_stacked, scale, output_slices, **more)
            return
        inputs, start = x.view(-1, x.shape[-1]).float(), 0
        outputs = y.view(-1, y.shape[-1])
        for down, up, width in zip(lora_a_stacked, lora_b_stacked, output_slices, strict=True):
            low = scale * (inputs @ down[self.slot, 0].float().t())
            outputs[:, start : start + width].addmm_(low.to(y.dtype), up[self.slot, 0].t())
            start += width


def use_one_adapter() -> None:
    """Let engines of this process compute with :class:`OneAdapter`. Call it before one starts, on a CPU."""
    platform: Any = type(current_platform)
    platform.get_punica_wrapper = classmethod(lambda _: f"{__name__}.{OneAdapter.__name__}")
