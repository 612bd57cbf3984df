"""The way of weights from a trainer to another process on the same device, without vLLM: packed into a buffer that the
other process maps, through torch's own inter-process memory (CUDA IPC on a GPU, shared memory on a CPU).

Always true: names, order, shapes and bits arrive as the trainer's source yields them; the checksum is computed on the device
on both sides. Weights that were changed on the way are told.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from multiprocessing.queues import Queue
from typing import Any

import torch
import torch.multiprocessing
from torch import Tensor

from benchmarks.figures import Figure, Figures
from rlhf_ray.engine.weights import disk_weights
from rlhf_ray.environment import Device
from rlhf_ray.models.weights.lora import add_lora
from rlhf_ray.rollout.wire import Checksum
from tests.gpu.receiver import receive
from tests.gpu.shapes import make
from tests.gpu.sizes import Sizes

LORA_RANK = 16
WAIT_S = 60.0
Description = list[tuple[str, torch.dtype, tuple[int, ...]]]


def weights_cross_processes(device: Device, sizes: Sizes) -> Figures:
    """A policy of the large shape, as it is and with adapters to merge; of two passes the second is timed."""
    model = make(sizes.large, device, sizes.published_layers)
    context = torch.multiprocessing.get_context("spawn")
    to_receiver, from_receiver = context.Queue(), context.Queue()
    receiver = context.Process(target=receive, args=(to_receiver, from_receiver), daemon=True)
    receiver.start()
    buffer = torch.empty(sizes.published_mib << 20, dtype=torch.uint8, device=device)
    figures = _passes(model, buffer, to_receiver, from_receiver, f"gpu.publication.{sizes.large}")
    add_lora(model, rank=LORA_RANK, alpha=LORA_RANK, dropout=0.0, targets="all-linear")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    figures |= _passes(model, buffer, to_receiver, from_receiver, f"gpu.publication.{sizes.large}.lora")
    to_receiver.put(None)
    receiver.join(WAIT_S)
    return figures


def _passes(model: Any, buffer: Tensor, to_receiver: Queue[Any], from_receiver: Queue[Any], name: str) -> Figures:
    for _ in range(2):
        if buffer.is_cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        sent, held = _send(model, buffer, to_receiver, from_receiver)
        seconds = time.perf_counter() - began
        received = from_receiver.get(timeout=WAIT_S)
        if received != sent:
            raise AssertionError(f"the weights that came have checksum {received}, sent was {sent}")
    method = f"all weights to another process in chunks of {buffer.numel() >> 20} MiB, checked on both sides" + (
        ", adapters merged" if name.endswith("lora") else ""
    )
    return {
        f"{name}.seconds": Figure(seconds, "s", False, method),
        f"{name}.rate": Figure(held / seconds / 1e9, "GB/s", True, method),
    }


def _send(model: Any, buffer: Tensor, to_receiver: Queue[Any], from_receiver: Queue[Any]) -> tuple[str, int]:
    """Send all weights, a chunk at a time; returns their checksum and bytes."""
    checksum, held = Checksum(), 0
    for chunk in _chunks(model, buffer.numel()):
        described: Description = []
        filled = 0
        for name, tensor in chunk:
            flat = tensor.detach().contiguous().view(-1).view(torch.uint8)
            buffer[filled : filled + flat.numel()].copy_(flat)
            checksum.add(name, tensor)
            described.append((name, tensor.dtype, tuple(tensor.shape)))
            filled += flat.numel()
        if buffer.is_cuda:
            torch.cuda.synchronize()  # the other process reads on a stream of its own
        to_receiver.put((described, buffer))
        from_receiver.get(timeout=WAIT_S)  # it has taken them: the buffer is free
        held += filled
    to_receiver.put("end")
    return checksum.hexdigest(), held


def _chunks(model: Any, most: int) -> Iterator[list[tuple[str, Tensor]]]:
    """Neighbours that fill a buffer together; a weight that is larger than it is cut by rows."""
    chunk: list[tuple[str, Tensor]] = []
    filled = 0
    for group in disk_weights(model, receive=True):
        for name, tensor in group:
            rows = max(1, most // max(1, tensor[0].numel() * tensor.element_size())) if tensor.dim() else 1
            for piece in tensor.split(rows) if tensor.dim() else (tensor,):
                size = piece.numel() * piece.element_size()
                if chunk and filled + size > most:
                    yield chunk
                    chunk, filled = [], 0
                chunk.append((name, piece))
                filled += size
    if chunk:
        yield chunk
