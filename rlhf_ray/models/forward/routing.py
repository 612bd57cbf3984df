"""What the routers of a mixture of experts choose in one forward pass of transformers: watched, or replayed.

Invariants: a router that replays sends each token to the given experts, and weighs them by its own formula from its own
scores of them, through which gradients flow. A token with :data:`NO_EXPERT` goes where the router itself sends it. Every
layer with experts has chosen exactly once, or the model is refused by its name. A layer that is computed again for the
backward pass chooses again as it did before.

A router of transformers 5.19 scores all experts and takes the best of them by one ``torch.topk`` over (tokens, experts),
whatever else its architecture does before and after that. So the choice is taken there, by torch's public function modes,
and every architecture keeps its own formula. ``tests/models/test_routing.py`` tries each one of
:data:`rlhf_ray.config.files.sampled.REPLAYED`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Int64, Integer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from rlhf_ray.errors import ModelLoadError, RequestError
from rlhf_ray.models.forward.last_tokens import decoder_layers
from rlhf_ray.trajectories.routed_experts import experts_dtype, numbers

ARGUMENT = "routing"
"""The keyword argument of a model's forward by which its layers get a :class:`Routing`."""
INSTALLED = "routing_installed"
"""Attribute of a backbone whose layers know that argument."""


@dataclass(eq=False)
class Routing:
    """One forward pass: what its routers replay, and what they chose."""

    replayed: Int64[Tensor, "routers tokens top_k"] | None = None
    """None: each router chooses by itself."""
    chosen: dict[int, Int64[Tensor, "tokens top_k"]] = field(default_factory=dict)
    """By the number of the router, counted from the first layer with experts."""
    experts: int = 0
    """Of the router that has most."""

    def arguments(self) -> dict[str, Any]:
        """Return the keyword arguments of a model's forward."""
        return {ARGUMENT: self}

    def column(self) -> Integer[Tensor, "tokens routers top_k"]:
        """Return what all routers chose, as a column of a batch."""
        return torch.stack([self.chosen[router] for router in sorted(self.chosen)], 1).to(experts_dtype(self.experts))


def watch(backbone: PreTrainedModel) -> Routing:
    """Return what a pass of ``backbone`` must be given to say what its routers choose.

    Raises :class:`RequestError` for a model without routers.
    """
    experts = _install(backbone)
    if not experts:
        raise RequestError(
            f"rollout.routing_replay is true, but {type(backbone).__name__} is no mixture of experts: set it to false"
        )
    return Routing(experts=max(experts))


def replay(backbone: PreTrainedModel, column: Integer[Tensor, "tokens routers top_k"]) -> Routing:
    """Return what a pass of ``backbone`` must be given to replay a column.

    Raises :class:`RequestError` for a column of another number of routers than the model has.
    """
    routers = len(_install(backbone))
    if column.shape[1] != routers:
        raise RequestError(
            f"the experts to replay are those of {column.shape[1]} routers, but {type(backbone).__name__} has {routers}: they "
            "come from another model"
        )
    return Routing(numbers(column))


def _install(backbone: PreTrainedModel) -> tuple[int, ...]:
    """Let the layers with experts know :data:`ARGUMENT`; returns how many experts each has."""
    if INSTALLED not in vars(backbone):
        layers = [(layer, experts) for layer in decoder_layers(backbone) for experts in _experts(layer)]
        for router, (layer, experts) in enumerate(layers):
            layer.forward = partial(_run_layer, layer, router, experts)
        vars(backbone)[INSTALLED] = tuple(experts for _, experts in layers)
    return cast("tuple[int, ...]", vars(backbone)[INSTALLED])


def _experts(layer: nn.Module) -> list[int]:
    """The number of experts of each mixture in a layer."""
    blocks = [getattr(module, "experts", None) for module in layer.modules()]
    return [cast(int, block.num_experts) for block in blocks if isinstance(block, nn.Module)]


def _run_layer(
    layer: nn.Module, router: int, experts: int, *args: Any, routing: Routing | None = None, **options: Any
) -> Any:
    forward = partial(type(layer).forward, layer)
    if routing is None:
        return forward(*args, **options)
    choice = _Choice(experts, None if routing.replayed is None else routing.replayed[router])
    with choice:
        output = forward(*args, **options)
    if len(choice.chosen) != 1:
        raise ModelLoadError(
            f"a {type(layer).__name__} chose experts {len(choice.chosen)} times in one pass, and routing replay needs one: set "
            "rollout.routing_replay to false"
        )
    routing.chosen[router] = choice.chosen[0]
    return output


class _Choice(TorchFunctionMode):
    """Within this mode a ``topk`` over all experts takes those that are replayed; other calls are as ever.

    A router that hides the experts of some groups before (DeepSeek-V2, ``group_limited_greedy``) would give hidden ones the
    weight 0 and no gradient. What is replayed may be among them, so it is weighed by the scores from before.
    """

    def __init__(self, experts: int, replayed: Int64[Tensor, "tokens top_k"] | None) -> None:
        super().__init__()
        self.experts, self.replayed = experts, replayed
        self.chosen: list[Int64[Tensor, "tokens top_k"]] = []
        self._hidden: tuple[Tensor, Tensor] | None = None
        """Scores of which some are hidden, and the same before."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        best = func(*args, **(kwargs or {}))
        if func in (torch.masked_fill, torch.Tensor.masked_fill):
            self._hidden = best, args[0]
        if func not in (torch.topk, torch.Tensor.topk) or args[0].dim() != 2 or args[0].shape[-1] != self.experts:
            return best
        if self.replayed is not None:
            best = self._replay(args[0], best)
        self.chosen.append(best.indices.detach())
        return best

    def _replay(self, scores: Tensor, best: Any) -> Any:
        assert self.replayed is not None
        own = best.indices
        if self.replayed.shape != own.shape:
            raise RequestError(
                f"a router chose experts of {tuple(own.shape)} (tokens, experts of a token), but those of "
                f"{tuple(self.replayed.shape)} are to be replayed"
            )
        taken = torch.where(self.replayed < 0, own, self.replayed)
        if self._hidden is not None and self._hidden[0] is scores:
            scores = self._hidden[1]
        weights = torch.where(self.replayed < 0, best.values, scores.gather(-1, taken))
        return torch.return_types.topk((weights, taken))
