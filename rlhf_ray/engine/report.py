"""The results of an update as plain numbers, which can be sent to another process.

Invariants: the sums in a ``Report`` are those of one rank, so the reports of all ranks add up to the numbers of the whole
update, however it was split. ``Report.finite`` and everything in ``Applied`` but the memory are the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhf_ray.models.devices import GpuPeak


@dataclass(frozen=True)
class Report:
    """One rank's share of an accumulated update.

    ``finite`` is true if no loss and no gradient of any rank was NaN or Inf. ``loss`` is the sum of this rank's losses divided
    by the denominator of the whole update. ``metrics`` maps a name to a sum and a count.
    """

    finite: bool
    loss: float
    metrics: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Applied:
    """The end of an update.

    ``grad_norm`` is taken before clipping, and None if the update was skipped; ``refused_norm`` is that of an update that was
    skipped because its norm was above the limit. ``update`` is the number of updates applied so
    far. ``gpu`` is the peak of this rank's GPU memory since the end of the last update; None on the CPU.
    """

    skipped: bool
    grad_norm: float | None
    learning_rate: float
    update: int
    gpu: GpuPeak | None = None
    refused_norm: float | None = None


class Totals:
    """Sums of losses and metrics over micro-batches. They stay on the device until they are read at the end."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._metrics: dict[str, Tensor] = {}

    def add(self, loss: Tensor, metrics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Add one micro-batch."""
        self._loss += loss.detach()
        for name, pair in metrics.items():
            values = [torch.as_tensor(value, dtype=torch.float64, device=self._device).detach() for value in pair]
            self._metrics[name] = self._metrics.get(name, 0.0) + torch.stack(values)

    def finite(self) -> bool:
        """Return whether no loss was NaN or Inf."""
        return bool(torch.isfinite(self._loss))

    def report(self, *, denominator: float, finite: bool) -> Report:
        """Return the sums so far as plain numbers."""
        metrics = {name: (float(pair[0]), float(pair[1])) for name, pair in self._metrics.items()}
        return Report(finite, float(self._loss) / denominator, metrics)
