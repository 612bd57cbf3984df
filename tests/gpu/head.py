"""Speed and memory of log-probabilities in chunks, against the formula on all logits at once.

Always true: both compute the same, from the same numbers, on the same device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from benchmarks.figures import Figure, Figures
from rlhf_ray.engine.matmul_rate import matmul_rate
from rlhf_ray.environment import Device
from rlhf_ray.models.forward.log_probs import LogProbHead
from tests.gpu.shapes import config_of
from tests.gpu.sizes import Sizes
from tests.gpu.throughput import peak_figure, reset_peak, synchronize

AGREES_TO = 1e-2
"""Largest difference of log-probs, as a share of their size."""


def head_figures(device: Device, sizes: Sizes, *, shape: str) -> Figures:
    """Scoring, and training with and without entropies, at the width and vocabulary of a model (``small`` or ``large``)."""
    config = config_of(getattr(sizes, shape))
    tokens, width, vocabulary = sizes.head_tokens, config.hidden_size, sizes.head_vocabulary
    torch.manual_seed(0)
    with torch.device(device):
        layer = torch.nn.Linear(width, vocabulary, bias=False, dtype=torch.bfloat16)
        hidden = torch.randn(tokens, width, dtype=torch.bfloat16)
        targets = torch.randint(vocabulary, (tokens,))
    head, rate = LogProbHead.around(layer, None), matmul_rate(torch.bfloat16, torch.device(device))
    with torch.no_grad():
        chunked, naive = head(hidden, targets)[0], _formula(layer.weight, hidden, targets)
    off = float((chunked - naive).norm() / naive.norm())
    if not off <= AGREES_TO:
        raise AssertionError(f"log-probs in chunks are off by {off:.1e} (limit {AGREES_TO})")
    del chunked, naive
    forward = 2.0 * tokens * width * vocabulary
    works: dict[str, tuple[Callable[[], object], float]] = {
        "scoring": (lambda: _without_gradient(lambda: head(hidden, targets)[0]), forward),
        "training": (lambda: _train(layer, hidden, lambda leaf: head(leaf, targets)[0]), 3 * forward),
        "training_with_entropy": (lambda: _train(layer, hidden, lambda leaf: sum(head(leaf, targets, 1.0, True))), 3 * forward),
        "formula_training": (lambda: _train(layer, hidden, lambda leaf: _formula(layer.weight, leaf, targets)), 3 * forward),
    }  # fmt: skip
    figures: Figures = {}
    for work, (run, operations) in works.items():
        reset_peak(device)
        seconds = _seconds(run, device, sizes.repeats)
        name = f"gpu.head.{width}x{vocabulary}.{work}"
        method = f"{'all logits at once' if 'formula' in work else 'chunks'}, {tokens} tokens, bf16; median of {sizes.repeats}"
        figures[f"{name}_tokens_per_second"] = Figure(tokens / seconds, "tokens/s", True, method)
        figures[f"{name}_share_of_matmul"] = Figure(operations / seconds / rate, "share", True, method)
        figures |= peak_figure(f"{name}_peak_memory", device, method)
    return figures


def _formula(weight: Tensor, hidden: Tensor, targets: Tensor) -> Tensor:
    return (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]


def _train(layer: torch.nn.Linear, hidden: Tensor, log_probs: Callable[[Tensor], Tensor]) -> None:
    log_probs(hidden.detach().requires_grad_()).sum().backward()
    layer.weight.grad = None


@torch.no_grad()
def _without_gradient(function: Callable[[], Tensor]) -> None:
    function()


def _seconds(run: Callable[[], object], device: Device, repeats: int) -> float:
    """Seconds of a run, median after one that is not counted."""
    taken = []
    for _ in range(repeats + 1):
        synchronize(device)
        began = time.perf_counter()
        run()
        synchronize(device)
        taken.append(time.perf_counter() - began)
    return median(taken[1:])
