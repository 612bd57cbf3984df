"""What an engine tells its caller: plain numbers that cross processes.

Always true: the sums of a ``Report`` are this rank's, so that adding the reports of all ranks gives the whole update's
numbers, however it was split; ``Report.finite`` and all of ``Applied`` are the same on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Report:
    """One rank's share of an accumulated update.

    ``finite`` says that no loss and no gradient of any rank was NaN or Inf; ``loss`` is the sum of this rank's losses over
    the denominator of the whole update; ``metrics`` maps a name to its sum and count.
    """

    finite: bool
    loss: float
    metrics: dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Applied:
    """The end of an update: ``update`` counts those applied so far; ``grad_norm``, before clipping, is none where skipped."""

    skipped: bool
    grad_norm: float | None
    learning_rate: float
    update: int


class Totals:
    """Sums of losses and metrics over micro-batches, kept on the device and read once."""

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
        """Whether no loss was NaN or Inf."""
        return bool(torch.isfinite(self._loss))

    def report(self, *, denominator: float, finite: bool) -> Report:
        """The sums so far as plain numbers."""
        metrics = {name: (float(pair[0]), float(pair[1])) for name, pair in self._metrics.items()}
        return Report(finite, float(self._loss) / denominator, metrics)
