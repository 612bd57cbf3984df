"""The process that takes weights from a trainer on the same device; it imports little, so that it is soon there.

Always true: what it says of a pass is the checksum of the weights that it has copied out of the mapped buffer.
"""

from __future__ import annotations

from multiprocessing.queues import Queue
from typing import Any

import torch

from rlhf_ray.rollout.wire import Checksum


def receive(to_receiver: Queue[Any], from_receiver: Queue[Any]) -> None:
    """Copy what comes out of the mapped buffer, and answer with the checksum of a whole pass."""
    checksum, taken = Checksum(), {}
    while (message := to_receiver.get()) is not None:
        if message == "end":
            from_receiver.put(checksum.hexdigest())
            checksum, taken = Checksum(), {}
            continue
        described, buffer = message
        start = 0
        for name, dtype, shape in described:
            size = torch.Size(shape).numel() * dtype.itemsize
            weight = buffer[start : start + size].clone().view(dtype).view(shape)
            checksum.add(name, weight)
            taken[name] = weight
            start += size
        if buffer.is_cuda:
            torch.cuda.synchronize()
        from_receiver.put("taken")
