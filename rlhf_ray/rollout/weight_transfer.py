"""Weight updates inside vLLM: its weight-transfer interface, fed with tensors by their names on disk.

Invariants: weights reach the model through its own ``load_weights`` inside a layerwise reload, so that fusing, sharding and
packing happen as they did at start-up; importing this module registers the backend, also in vLLM's worker processes, where
:class:`RegisterInWorker` is the workers' extension.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rlhf_ray.rollout.vllm_repairs import forget_packed_experts, repack_tied_heads

BACKEND = "rlhf_ray"


class LoadsWeights(Protocol):
    """A model of vLLM, which knows where a weight of each name on disk belongs."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> object:
        """Copy ``weights`` into the model's own layout."""


@dataclass
class NoInitInfo(WeightTransferInitInfo):
    """Nothing to agree on: weights come as arguments of the call."""


@dataclass
class NamedWeights(WeightTransferUpdateInfo):
    """One bucket."""

    weights: list[tuple[str, torch.Tensor]]


class NamedWeightsEngine(WeightTransferEngine[NoInitInfo, NamedWeights]):
    """Loads buckets of tensors that are on the CPU, whatever device the model is on."""

    init_info_cls = NoInitInfo
    update_info_cls = NamedWeights

    def init_transfer_engine(self, init_info: NoInitInfo) -> None:
        """Nothing to connect."""

    def start_weight_update(self) -> None:
        """Make the model take whole weights again, layer by layer."""
        forget_packed_experts(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket; the base class would wait for an accelerator, which a CPU build does not have."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: NamedWeights) -> None:
        """Hand the bucket to the model's own loader."""
        cast(LoadsWeights, self.model).load_weights(iter(update_info.weights))

    def finish_weight_update(self) -> None:
        """Process what came, into the tensors that the compiled model reads."""
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_heads(self.model)

    def shutdown(self) -> None:
        """Nothing to release."""


class RegisterInWorker:
    """A worker extension without methods: naming it makes a worker import this module."""


WeightTransferEngineFactory.register_engine(BACKEND, NamedWeightsEngine)
# On every update it warns that modules without weights (rotary embeddings) got none. That every weight came is checked
# by the sender's and the receiver's list of names (rlhf_ray.rollout.wire).
logging.getLogger(initialize_layerwise_reload.__module__).setLevel(logging.ERROR)
