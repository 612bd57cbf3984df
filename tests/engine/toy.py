"""A small model, its batches and a plain torch reference for the programs that the engine's tests start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlhf_ray.algorithms.losses import LossOutput, PolicyOutputs
from rlhf_ray.config.sections.engine import EngineConfig
from rlhf_ray.engine.optimizer import parameter_groups
from rlhf_ray.engine.schedules import learning_rate

VOCABULARY, HIDDEN = 48, 32
TOTAL_UPDATES = 8


class Head(nn.Linear):
    """Log-probs in chunks, as the real head: it owns its loop, so ZeRO-3 gathers its weight once a call."""

    chunk = 8

    def forward(self, hidden: Tensor, targets: Tensor) -> Tensor:
        parts = zip(hidden.split(self.chunk), targets.split(self.chunk), strict=True)
        logits = [(nn.functional.linear(h.float(), self.weight.float()), t) for h, t in parts]
        return torch.cat([rows.log_softmax(-1).gather(-1, t[:, None])[:, 0] for rows, t in logits])


class Toy(nn.Module):
    """A causal model of packed sequences: embedding, running mean, a normalised MLP, and a head, tied on request."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, 2 * HIDDEN), nn.GELU(), nn.Linear(2 * HIDDEN, HIDDEN))
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(HIDDEN)
        self.head = Head(HIDDEN, VOCABULARY, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, sequences: Sequence[Tensor]) -> PolicyOutputs:
        embedded = self.embedding(torch.cat([tokens[:-1] for tokens in sequences]))
        hidden = torch.cat([self._mix(part) for part in embedded.split([len(tokens) - 1 for tokens in sequences])])
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return PolicyOutputs(self.head(self.norm(hidden), torch.cat([tokens[1:] for tokens in sequences])))

    @staticmethod
    def _mix(embedded: Tensor) -> Tensor:
        count = torch.arange(1, len(embedded) + 1)[:, None]
        return (embedded.float().cumsum(0) / count).to(embedded.dtype) + embedded


class TwoHeads(nn.Module):
    """A module of which a micro-batch uses only one half."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.a = nn.Linear(HIDDEN, HIDDEN, bias=False)
        self.b = nn.Linear(HIDDEN, HIDDEN, bias=False)

    def forward(self, which: str) -> Tensor:
        features = torch.linspace(-1, 1, 3 * HIDDEN, dtype=self.trunk.weight.dtype).view(3, HIDDEN)
        return (self.a if which == "a" else self.b)(self.trunk(features)).float().square().sum()


@dataclass(frozen=True)
class Micro:
    """Sequences of one micro-batch, none for a dummy; ``poison`` spoils its loss, or only its gradient."""

    sequences: tuple[Tensor, ...]
    poison: str | None = None


def make(kind: type[nn.Module] = Toy, **arguments: bool) -> nn.Module:
    """The same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        return kind(**arguments)


def make_batch(seed: int, count: int = 14) -> list[Tensor]:
    """Sequences of 2 to 40 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, 41, (count,), generator=generator)
    return [torch.randint(0, VOCABULARY, (int(length),), generator=generator) for length in lengths]


def tokens(batch: Sequence[Tensor]) -> float:
    """What the loss of ``batch`` is divided by."""
    return float(sum(len(sequence) - 1 for sequence in batch))


def split(batch: Sequence[Tensor], ranks: int, count: int) -> list[list[Micro]]:
    """``count`` micro-batches of unequal length a rank; the last rank of two has dummies where ``count`` is above 1."""
    dummies = set() if ranks == 1 or count == 1 else {(1, count - 1), (1, count // 2)}
    cells = [(rank, k) for k in range(count) for rank in range(ranks)]
    real = [cell for cell in cells if cell not in dummies]
    held: dict[tuple[int, int], list[Tensor]] = {cell: [] for cell in cells}
    for index, sequence in enumerate(batch):
        held[real[index if index < len(real) else index * index % len(real)]].append(sequence)
    return [[Micro(tuple(held[rank, k])) for k in range(count)] for rank in range(ranks)]


def loss_of(module: nn.Module, micro: Micro) -> LossOutput:
    """Summed negative log-likelihood; a dummy weighs nothing but passes through every part of the module."""
    if not micro.sequences:
        return LossOutput(module([torch.tensor([0, 0])]).log_probs.sum() * 0.0, {})
    log_probs = module(micro.sequences).log_probs
    loss = -log_probs.sum()
    if micro.poison == "loss":
        loss = loss * float("nan")
    if micro.poison == "gradient":
        loss = loss + (log_probs - log_probs).abs().sqrt().sum()  # its value is 0 and its slope 0 times infinity
    count = torch.tensor(float(len(log_probs)))
    return LossOutput(loss, {"loss": (loss.detach(), count), "sequences": (torch.tensor(len(micro.sequences)), count)})


def engine_config(zero: int, *, offload: str = "none", max_grad_norm: float = 1e6) -> EngineConfig:
    """AdamW with weight decay and a schedule that moves; unclipped unless asked."""
    optimizer = {
        "learning_rate": 1e-2, "weight_decay": 0.1, "max_grad_norm": max_grad_norm, "schedule": "linear",
        "warmup_fraction": 0.25,
    }  # fmt: skip
    return EngineConfig.model_validate({"zero": zero, "offload": offload, "optimizer": optimizer})


@dataclass(frozen=True)
class Reference:
    """Gradients, their norms and weights after each update, by one process with plain autograd on the whole batch."""

    gradients: list[dict[str, Tensor]]
    norms: list[float]
    weights: list[dict[str, Tensor]]
    losses: list[float]


def reference(batches: Sequence[Sequence[Tensor]], *, max_grad_norm: float = 1e6, tied: bool = False) -> Reference:
    """Train the toy with torch's own AdamW, one whole batch an update."""
    config = engine_config(0).optimizer
    assert config is not None
    module, result = make(tied=tied), Reference([], [], [], [])
    groups = parameter_groups(module, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=config.betas, eps=config.eps)
    for update, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, update, TOTAL_UPDATES)
        optimizer.zero_grad()
        loss = loss_of(module, Micro(tuple(batch))).loss / tokens(batch)
        loss.backward()
        result.losses.append(float(loss.detach()))
        result.gradients.append({name: p.grad.clone() for name, p in module.named_parameters()})
        result.norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)))
        optimizer.step()
        result.weights.append({name: p.detach().clone() for name, p in module.named_parameters()})
    return result


def distance(left: dict[str, Tensor], right: dict[str, Tensor]) -> float:
    """Norm of the difference over the norm of ``right``, over all tensors of the same names."""
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    difference = sum(float((left[name].double() - right[name].double()).square().sum()) for name in right)
    return (difference / sum(float(tensor.double().square().sum()) for tensor in right.values())) ** 0.5


def change(after: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, Tensor]:
    """What an update did to the weights."""
    return {name: after[name].double() - before[name].double() for name in after}
