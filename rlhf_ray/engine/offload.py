"""Move what a training engine holds from its device to the host and back, on a GPU that other roles need meanwhile.

Invariants: what comes back has the same bits. A move that failed is completed by the same call again.

DeepSpeed 0.19 moves the states of its own ZeRO stages alone; at stage 3 those of its own Adam alone, so that ours must lie on
the host there (``engine.offload: optimizer``), and no model with frozen weights beside others.
``config/checks/colocation.py`` refuses the rest before a job starts. The calls run on CPU in tests, where nothing is won by
them. On a GPU they have not run yet.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.zero.offload_config import OffloadStateTypeEnum
from torch import nn

ALL_BUT_WEIGHTS = [state for state in OffloadStateTypeEnum if state is not OffloadStateTypeEnum.lp_params]
"""The states without the weights that compute (DeepSpeed's low-precision parameters)."""


class OffDevice:
    """Moves the states of one DeepSpeed engine, and its frozen weights, which DeepSpeed leaves where they are."""

    def __init__(self, deepspeed: Any, module: nn.Module, device: torch.device, *, trainable: bool) -> None:
        self._deepspeed, self._module, self._device, self._trainable = deepspeed, module, device, trainable
        self._moved: list[nn.Parameter] = []
        self.is_away = False
        """Whether anything may lie on the host."""

    def offload(self, *, keep_weights: bool) -> None:
        """Move everything to the host, or everything but the weights. A second call moves what is still there."""
        self.is_away = True
        if self._trainable:
            self._deepspeed.offload_states(include=ALL_BUT_WEIGHTS if keep_weights else None)
        if not keep_weights:
            for parameter in self._frozen():
                parameter.data = parameter.data.to("cpu")
                self._moved.append(parameter)
        if self._device.type == "cuda":
            torch.cuda.ipc_collect()  # what engines on this GPU have read and let go
            torch.cuda.empty_cache()

    def reload(self) -> None:
        """Bring back all that was moved."""
        if self._trainable:
            self._deepspeed.reload_states()
        while self._moved:
            parameter = self._moved[-1]
            parameter.data = parameter.data.to(self._device)
            self._moved.pop()
        self.is_away = False

    def _frozen(self) -> list[nn.Parameter]:
        """Frozen weights that are whole on this rank; ZeRO-3 keeps the shards of others."""
        moved = set(map(id, self._moved))
        return [
            parameter
            for parameter in self._module.parameters()
            if not parameter.requires_grad and not hasattr(parameter, "ds_id") and id(parameter) not in moved
        ]
