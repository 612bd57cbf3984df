"""Weights from GPU to GPU, the trainer's side: vLLM's own transfer engines, fed with a layer at a time.

Invariants: every pass walks the model anew, in the order of the metadata, and sums up what it yields; a weight is complete, for
whatever stream reads it, before it is yielded; what the sender summed up is what each engine compares with.

This is the only module that uses the trainer's side of vLLM's weight transfer, whose interface (``WeightSource``) changes from
0.32 to 0.33. ``tests/rollout/test_weight_sender.py`` runs it on CPU, with gloo in the place of NCCL, and fails when it changes.
Neither backend has run on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

from rlhf_ray.console import get_logger
from rlhf_ray.engine.weights import DiskWeight, Group
from rlhf_ray.models.devices import CPU
from rlhf_ray.rollout.transport import Transport
from rlhf_ray.rollout.wire import Checksum

CHUNK_BYTES = 256 * 2**20
"""How much is packed before it is sent, unless one weight is larger."""
CallEngines = Callable[[str, Sequence[tuple[Any, ...]]], Any]
"""Calls a method of every engine, each with its own arguments, and returns when all have answered."""


@dataclass(frozen=True)
class Route:
    """How one rank of the trainer and the engines are connected."""

    transport: Transport
    rank: int
    engines: int
    workers: int
    """Of each engine: its tensor parallel size."""
    address: str
    """Where rank 0 listens for the workers of the engines."""
    port: int


class DiskWeights(WeightSource):
    """The weights of a model by their names on disk, on its device, as vLLM's transfer engines read them."""

    def __init__(self, described: Sequence[DiskWeight], walk: Callable[[], Iterable[Group]]) -> None:
        """``walk`` begins a pass over the weights, a layer at a time, as ``engine.weights.disk_weights`` does."""
        self._described, self._walk = described, walk
        self.checksum = Checksum()
        """Of what the last pass yielded."""

    def metadata(self) -> list[ParamMeta]:
        """Name, dtype and shape of all that a pass yields, without moving a weight."""
        return [ParamMeta(weight.name, weight.dtype, weight.shape) for weight in self._described]

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Begin a pass. Collective under ZeRO-3."""
        self.checksum = Checksum()
        for group in self._walk():
            for name, tensor in group:
                self.checksum.add(name, tensor)
            _complete(group)
            for name, tensor in group:
                if tensor.is_cuda:  # it may be read on another stream than the layer was gathered on
                    tensor.record_stream(torch.cuda.current_stream())
                yield name, tensor

    @property
    def sizes(self) -> list[int]:
        """The bytes of each weight."""
        return [weight.dtype.itemsize * torch.Size(weight.shape).numel() for weight in self._described]


def _complete(group: Group) -> None:
    """Wait until the weights of a layer are there: vLLM reads them on streams of its own."""
    if any(tensor.is_cuda for _, tensor in group):
        torch.cuda.current_stream().synchronize()


def _own_stream(device: torch.device) -> AbstractContextManager[object]:
    """Keep the stream that this rank trains on: vLLM 0.32 takes another one, for good, in a process that has chosen none."""
    return torch.cuda.stream(torch.cuda.current_stream(device)) if device.type == "cuda" else nullcontext()


class WeightSender:
    """One rank's side of the way to the engines. Every rank of the trainer makes one and calls it."""

    def __init__(
        self, route: Route, source: DiskWeights, call_engines: CallEngines, device: torch.device = CPU
    ) -> None:
        """Connect from ``device``, on which this rank trains. Rank 0 calls the engines, which must be idle."""
        self._client = _Engines(route, source, call_engines)
        self.nbytes = sum(source.sizes)
        """Of all weights."""
        # The trainer's side of nccl and that of ipc take their parts from the same factory.
        with _own_stream(device):
            self._engine = WeightTransferTrainerFactory.trainer_init(
                _init_info(route, max(CHUNK_BYTES, *source.sizes)), client=self._client, source=source
            )

    def send(self, version: int) -> None:
        """Send all weights as ``version``; when rank 0 returns, every engine has checked and adopted them.

        The caller waits for what still changes them.
        """
        self._client.version = version
        self._engine.send_weights()

    def close(self) -> None:
        """Leave the group with the engines."""
        self._engine.shutdown()


def _init_info(route: Route, chunk_bytes: int) -> TrainerInitInfo:
    if route.transport == "ipc":
        return IPCTrainerInitInfo(rank=route.rank, packed=True, packed_buffer_size_bytes=chunk_bytes)
    return NCCLTrainerInitInfo(
        master_address=route.address,
        master_port=route.port,
        world_size=1 + route.engines * route.workers,
        rank=route.rank,
        packed=True,
        packed_buffer_size_bytes=chunk_bytes,
    )


class _Engines:
    """What rank 0 asks of the engines: vLLM's ``VLLMWeightSyncClient``, for several engines as one."""

    def __init__(self, route: Route, source: DiskWeights, call_engines: CallEngines) -> None:
        self._route, self._source, self._call_engines = route, source, call_engines
        self.version = 0

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Let the workers of all engines join the group, in the order of the engines."""
        infos = [dict(init_info) for _ in range(self._route.engines)]
        for number, info in enumerate(infos):
            if "rank_offset" in info:
                info["rank_offset"] += number * self._route.workers
        self._call("connect", [(self._route.transport, info) for info in infos])

    def start_weight_update(self) -> None:
        """Begin an update in every engine."""
        self._everywhere("begin_update")

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        """Have every engine take what is being sent."""
        self._everywhere("take_sent", update_info)

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Have every engine compare checksums and adopt the weights."""
        self._everywhere("finish_update", self.version, self._source.checksum.hexdigest())

    def _everywhere(self, method: str, *arguments: Any) -> None:
        self._call(method, [arguments] * self._route.engines)

    def _call(self, method: str, arguments: list[tuple[Any, ...]]) -> None:
        try:
            self._call_engines(method, arguments)
        except (
            Exception
        ) as error:  # vLLM waits for all that was to be sent before it looks at what became of the engines
            get_logger("weights").error("the engines failed in %s: %s", method, error)
            raise
