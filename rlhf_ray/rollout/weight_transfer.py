"""Weight updates inside vLLM: its weight-transfer interface, fed with tensors by their names on disk.

Invariants: however weights come, with the call or from GPU to GPU through vLLM's own engines, they reach the model through its
own ``load_weights`` inside a layerwise reload, so that fusing, sharding and packing happen as they did at start-up; importing
this module registers the backend, also in vLLM's worker processes, where :class:`RegisterInWorker` is the workers' extension.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from vllm.config import VllmConfig, WeightTransferConfig
from vllm.distributed.weight_transfer import WeightTransferEngine, WeightTransferEngineFactory
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
from vllm.platforms import current_platform

from rlhf_ray.rollout.vllm_repairs import forget_packed_experts, repack_tied_heads
from rlhf_ray.rollout.vllm_sampling.inverse_transform import InverseTransformInWorker
from rlhf_ray.rollout.vllm_sampling.kept_sets import KeptInWorker
from rlhf_ray.rollout.vllm_sampling.routed_experts import RoutedInWorker
from rlhf_ray.rollout.vllm_workers import SharedBucket, stay_eager
from rlhf_ray.rollout.weights.vllm_cpu_lora import use_one_adapter
from rlhf_ray.rollout.wire import Checksum

BACKEND = "rlhf_ray"


class LoadsWeights(Protocol):
    """A model of vLLM, which knows where a weight of each name on disk belongs."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> object:
        """Copy ``weights`` into the model's own layout."""


@dataclass
class Connection(WeightTransferInitInfo):
    """How weights come from GPU to GPU: the name of one of vLLM's engines, and what it asks for to connect."""

    transport: str
    info: dict[str, Any]


@dataclass
class Incoming(WeightTransferUpdateInfo):
    """Weights that came with the call, or where a worker process finds them, or else what the connected engine needs to know
    to fetch those that are sent.
    """

    weights: list[tuple[str, torch.Tensor]] | SharedBucket | None = None
    sent: dict[str, Any] | None = None


class Receiver(WeightTransferEngine[Connection, Incoming]):
    """Loads buckets of tensors that are on the CPU, and what vLLM's own engines receive on the device."""

    init_info_cls = Connection
    update_info_cls = Incoming

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.received = Checksum()
        """Of what came on the device in this update."""
        self._connected: WeightTransferEngine[Any, Any] | None = None

    def init_transfer_engine(self, init_info: Connection) -> None:
        """Connect to the trainer through vLLM's engine of that name, instead of a connection of before."""
        self.shutdown()
        config = WeightTransferConfig(backend=init_info.transport)
        self._connected = WeightTransferEngineFactory.create_engine(
            config, self.vllm_config, self.device, cast(torch.nn.Module, SummedUp(self))
        )
        self._connected.init_transfer_engine(self._connected.parse_init_info(init_info.info))

    def start_weight_update(self) -> None:
        """Make the model take whole weights again, layer by layer."""
        self.received = Checksum()
        forget_packed_experts(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load one bucket; the base class would wait for an accelerator, which a CPU build does not have."""
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Incoming) -> None:
        """Hand the weights to the model's own loader."""
        if update_info.sent is None:
            weights = update_info.weights
            here = weights.read() if isinstance(weights, SharedBucket) else weights or ()
            cast(LoadsWeights, self.model).load_weights(iter(here))
            return
        assert self._connected is not None, "the trainer connects before it sends"
        self._connected.receive_weights(self._connected.parse_update_info(update_info.sent))

    def finish_weight_update(self) -> None:
        """Process what came, into the tensors that the compiled model reads."""
        if isinstance(self._connected, IPCWeightTransferEngine):
            self._connected.shutdown()  # it lets go of the trainer's buffer, which the next update brings anew
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_heads(self.model)

    def shutdown(self) -> None:
        """Leave the group with the trainer."""
        if self._connected is not None:
            self._connected.shutdown()
            self._connected = None


class SummedUp:
    """The model as vLLM's engines see it: all that they ask of it is to load weights, which are summed up on their way."""

    def __init__(self, receiver: Receiver) -> None:
        self._receiver = receiver

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> object:
        """Add ``weights`` to the checksum of what was received, and load them."""
        arrived = list(weights)
        for name, weight in arrived:
            self._receiver.received.add(name, weight)
        loaded = cast(LoadsWeights, self._receiver.model).load_weights(iter(arrived))
        if any(weight.is_cuda for _, weight in arrived):
            # A module that came in several chunks is put together on the stream of the last one, from memory of the others.
            torch.cuda.current_stream().synchronize()
        return loaded


class RegisterInWorker(KeptInWorker, RoutedInWorker, InverseTransformInWorker):
    """A worker extension: naming it makes a worker import this module, and it answers what a worker is not asked by vLLM."""

    device: torch.device
    vllm_config: VllmConfig
    weight_transfer_engine: Receiver

    def gpu(self) -> str | None:
        """The UUID of this worker's GPU; None on a CPU."""
        return str(torch.cuda.get_device_properties(self.device).uuid) if self.device.type == "cuda" else None

    def attention(self) -> list[str]:
        """The attention backends of this worker's layers, by vLLM's names."""
        layers = self.vllm_config.compilation_config.static_forward_context.values()
        return sorted({layer.get_attn_backend().get_name() for layer in layers if hasattr(layer, "get_attn_backend")})

    def received_checksum(self) -> str:
        """The checksum of what came on the device in this update."""
        return self.weight_transfer_engine.received.hexdigest()


if current_platform.is_cpu():
    stay_eager()
    use_one_adapter()


WeightTransferEngineFactory.register_engine(BACKEND, Receiver)
# On every update it warns that modules without weights (rotary embeddings) got none. That every weight came is checked
# by the sender's and the receiver's list of names (rlhf_ray.rollout.wire).
logging.getLogger(initialize_layerwise_reload.__module__).setLevel(logging.ERROR)
