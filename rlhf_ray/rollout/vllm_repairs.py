"""What vLLM 0.32 leaves undone when a running model gets new weights, done here.

Invariant: after an update every layer computes what it would compute in an engine that started from the new weights.

Two kinds of layers need help, both on CPU, where kernels read packed copies of weights. vLLM has no public interface for
either, so this module names the parts that it touches, and ``tests/rollout/test_vllm_repairs.py`` fails when they change.

- **Experts.** ``UnquantizedFusedMoEMethod`` packs (and pads) the experts of a layer when it makes the layer's kernel, and makes
  that once. A second set of weights stays unpacked, and the kernel reads it as if it were packed. So the kernel is dropped
  before an update, and made anew by it.
- **Tied heads.** A head that shares the embedding has no weight of its own on disk. The layerwise reload leaves it as it was,
  with its packed copy of the old embedding. So it is processed again after an update.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.platforms import current_platform


def forget_packed_experts(model: torch.nn.Module) -> None:
    """Make the coming update process experts as at start. Call it before the reload begins."""
    if not current_platform.is_cpu():
        return
    for layer in model.modules():
        method = getattr(layer, "quant_method", None)
        if isinstance(method, UnquantizedFusedMoEMethod):
            method.moe_kernel = None


def repack_tied_heads(model: torch.nn.Module) -> None:
    """Process layers again whose weight is another layer's. Call it when the reload has ended."""
    owners: dict[int, torch.nn.Module] = {}
    for layer in model.modules():
        for weight in layer.parameters(recurse=False):
            tied = owners.setdefault(id(weight), layer) is not layer
            method = getattr(layer, "quant_method", None)
            if tied and isinstance(method, UnquantizedEmbeddingMethod):
                method.process_weights_after_loading(layer)
