"""What vLLM's transfer engines bring is what the object store would bring: the same names, order, shapes and bits."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Listener
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import reductions
from vllm.distributed.weight_transfer import base

from rlhf_ray.engine.weights import describe_disk_weights, disk_weights
from rlhf_ray.rollout import weight_sender
from rlhf_ray.rollout.errors import WireError
from rlhf_ray.rollout.weight_sender import Route, WeightSender
from rlhf_ray.rollout.weight_transfer import Receiver
from rlhf_ray.rollout.wire import IncomingUpdate, publish, to_tensor
from tests.rollout.sender_program import CHUNK_BYTES, MODELS, source_of
from tests.rollout.stand_ins import on_cpu


class Recorder:
    """Stands for a model of vLLM: it keeps what it is given to load, and in which calls."""

    def __init__(self) -> None:
        self.calls: list[list[tuple[str, Tensor]]] = []

    def load_weights(self, weights: Any) -> None:
        self.calls.append([(name, weight.clone()) for name, weight in weights])

    @property
    def weights(self) -> list[tuple[str, Tensor]]:
        return [pair for call in self.calls for pair in call]


class Worker:
    """A worker of an engine, with our receiver and a recorder for its model; an engine with one worker is no more here."""

    def __init__(self, number: int = 0) -> None:
        self.recorder = Recorder()
        parallel = SimpleNamespace(data_parallel_index=0, world_size=1, rank=number)
        config: Any = SimpleNamespace(parallel_config=parallel, model_config=None)
        model: Any = self.recorder
        self.receiver = Receiver(None, config, torch.device("cpu"), model)
        self.version: int | None = None

    def connect(self, transport: str, info: dict[str, Any]) -> None:
        self.receiver.init_transfer_engine(self.receiver.parse_init_info({"transport": transport, "info": info}))

    def begin_update(self) -> None:
        self.recorder.calls.clear()
        self.receiver.received = type(self.receiver.received)()

    def take_sent(self, info: dict[str, Any]) -> None:
        self.receiver.update_weights({"sent": info})

    def finish_update(self, version: int, checksum: str) -> None:
        IncomingUpdate({}).close(checksum, [self.receiver.received.hexdigest()])
        self.version = version


def published(name: str) -> list[tuple[str, Tensor]]:
    """What the object store would bring of a model."""
    groups = disk_weights(MODELS[name](), receive=True)
    return [
        (name, to_tensor(array))
        for bucket in publish(1, (pair for group in groups for pair in group)).buckets
        for name, array in bucket
    ]


def assert_same(received: Sequence[tuple[str, Tensor]], expected: Sequence[tuple[str, Tensor]]) -> None:
    assert [name for name, _ in received] == [name for name, _ in expected]
    for (name, there), (_, here) in zip(received, expected, strict=True):
        assert there.dtype == here.dtype and there.shape == here.shape, name
        assert torch.equal(there, here), name


class Trainer:
    """The other process, and how it reaches an engine here."""

    def __init__(self, directory: Path) -> None:
        address = str(directory / "socket")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self._listener = Listener(address)
        program = [sys.executable, "-m", "tests.rollout.sender_program", address, str(port)]
        self._process = subprocess.Popen(program, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])})
        self._connection = self._listener.accept()

    def send(self, what: str, engine: Any, versions: Sequence[int] = (1,)) -> None:
        """Have the model ``what`` sent to ``engine`` once for each version."""
        self._connection.send((what, versions, 1))
        while (called := self._connection.recv()) is not None:
            method, arguments = called
            try:
                getattr(engine, method)(*arguments[0])
                self._connection.send(None)
            except Exception as error:
                self._connection.send(error)
                raise

    def close(self) -> None:
        self._connection.send(None)
        assert self._process.wait(timeout=60) == 0
        self._listener.close()


@pytest.fixture(scope="module")
def trainer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trainer]:
    trainer = Trainer(tmp_path_factory.mktemp("sender"))
    yield trainer
    trainer.close()


@pytest.fixture
def cpu() -> Iterator[None]:
    with on_cpu():
        yield


@pytest.mark.parametrize("name", list(MODELS))
def test_the_bits_that_the_object_store_would_bring_arrive_from_another_process(
    name: str, trainer: Trainer, cpu: None
) -> None:
    worker, expected = Worker(), published(name)
    trainer.send(name, worker, versions=(7, 8))
    assert_same(worker.recorder.weights, expected)
    assert worker.version == 8
    nbytes = [sum(weight.nbytes for _, weight in call) for call in worker.recorder.calls]
    assert len(nbytes) > 3, "the model comes in chunks, not as a whole"
    assert max(nbytes) <= 2 * max(CHUNK_BYTES, *(weight.nbytes for _, weight in expected))


@pytest.mark.parametrize("name", list(MODELS))
def test_the_same_bits_arrive_through_memory_that_both_sides_see(
    name: str, cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weight_sender, "CHUNK_BYTES", CHUNK_BYTES)
    workers = [Worker(), Worker()]

    def call_engines(method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        for worker, own in zip(workers, arguments, strict=True):
            getattr(worker, method)(*own)

    sender = WeightSender(Route("ipc", 0, 2, 1, "127.0.0.1", 0), source_of(MODELS[name]()), call_engines)
    refused = None
    try:
        sender.send(4)
    except WireError as error:
        refused = error
    assert refused is None
    for worker in workers:
        assert_same(worker.recorder.weights, published(name))
        assert worker.version == 4 and len(worker.recorder.calls) > 3


@pytest.mark.parametrize("name", list(MODELS))
def test_what_is_announced_is_what_comes_without_computing_a_weight(name: str) -> None:
    model = MODELS[name]()
    expected = [(name, weight.dtype, tuple(weight.shape)) for name, weight in published(name)]
    assert [tuple(weight) for weight in describe_disk_weights(model)] == expected
    if not name.endswith("tied bf16"):  # moving to a device without memory would untie it
        assert [tuple(weight) for weight in describe_disk_weights(model.to("meta"))] == expected


def test_a_changed_bit_on_the_way_is_refused(cpu: None) -> None:
    worker = Worker()

    def call_engines(method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        (own,) = arguments
        if method == "take_sent":
            identity = own[0]["ipc_handles"]["the-gpu"]
            reductions.rebuild_cuda_tensor(*identity)[3] ^= 128  # a byte of what is on its way
        getattr(worker, method)(*own)

    sender = WeightSender(Route("ipc", 0, 1, 1, "127.0.0.1", 0), source_of(MODELS["untied fp32"]()), call_engines)
    with pytest.raises(WireError, match="have checksum"):
        sender.send(1)


def test_each_worker_of_each_engine_has_a_place_of_its_own_in_the_group() -> None:
    calls: list[Any] = []
    route = Route("nccl", 0, 3, 2, "10.0.0.1", 5000)
    engines = weight_sender._Engines(route, source_of(MODELS["untied fp32"]()), lambda *call: calls.append(call))
    engines.init_weight_transfer_engine({"rank_offset": 1, "world_size": 7})
    ((method, arguments),) = calls
    assert method == "connect"
    assert [info["rank_offset"] for _, info in arguments] == [1, 3, 5], "rank 0 is the trainer's"
    assert weight_sender._init_info(route, 1).world_size == 7  # type: ignore[attr-defined]


def test_vllm_still_asks_a_source_for_what_ours_gives() -> None:
    """vLLM 0.33 takes these away: then the module that feeds its engines has to be written anew."""
    assert {"metadata", "__iter__"} == base.WeightSource.__abstractmethods__, "feed vLLM's engines in its new way"
    assert {"held_names", "groups", "iter_groups"} <= set(vars(base.WeightSource))
    wanted = {"init_weight_transfer_engine", "start_weight_update", "update_weights", "finish_weight_update"}
    assert wanted == {name for name in vars(base.VLLMWeightSyncClient) if not name.startswith("_")}
