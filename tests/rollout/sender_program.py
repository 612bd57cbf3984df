"""The trainer's process of a test: it sends models through vLLM's nccl engine, over gloo, to engines of another process.

``python -m tests.rollout.sender_program SOCKET PORT``: at the socket it is told what to send, and calls the engines.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from rlhf_ray.engine.weights import describe_disk_weights, disk_weights
from rlhf_ray.models.weights.lora import ADAPTER, adapted_layers, add_lora
from rlhf_ray.rollout import weight_sender
from rlhf_ray.rollout.weight_sender import DiskWeights, Route, WeightSender
from tests.architectures.configs import small_model
from tests.rollout.llamas import make_llama
from tests.rollout.stand_ins import on_cpu

CHUNK_BYTES = 2**14


def with_lora(model: PreTrainedModel) -> PreTrainedModel:
    """Adapters that change their layers."""
    add_lora(model, rank=2, alpha=4)
    generator = torch.Generator().manual_seed(1)
    for layer in adapted_layers(model).values():
        layer.lora_B[ADAPTER].weight.data.normal_(generator=generator)
    return model


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "untied fp32": lambda: make_llama(1),
    "tied bf16": lambda: make_llama(2, tied=True).to(torch.bfloat16),
    "adapters on tied bf16": lambda: with_lora(make_llama(3, tied=True).to(torch.bfloat16)),
    "adapters on fp32": lambda: with_lora(make_llama(4)),
    "experts fp32": lambda: small_model("qwen3_moe", policy=True)[0],
}


def source_of(model: PreTrainedModel) -> DiskWeights:
    return DiskWeights(describe_disk_weights(model), partial(disk_weights, model, receive=True))


def serve(connection: Connection, port: int) -> None:
    """Send what the other side names, each with the number of passes, until it names nothing."""
    port = int(port)

    def call_engines(method: str, arguments: Sequence[tuple[Any, ...]]) -> None:
        connection.send((method, arguments))
        error = connection.recv()
        if error is not None:
            raise error

    while (wanted := connection.recv()) is not None:
        name, versions, engines = wanted
        sender = WeightSender(Route("nccl", 0, engines, 1, "127.0.0.1", port), source_of(MODELS[name]()), call_engines)
        for version in versions:
            sender.send(version)
        sender.close()
        connection.send(None)


if __name__ == "__main__":
    weight_sender.CHUNK_BYTES = CHUNK_BYTES
    with on_cpu(), Client(str(Path(sys.argv[1]))) as to_engines:
        serve(to_engines, int(sys.argv[2]))
