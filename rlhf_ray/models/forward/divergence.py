"""How far a policy is from its teacher at each token, over the whole vocabulary.

Invariants: logits and divergences are fp32. At most one chunk of logits of both models exists at a time, also in the backward
pass, which computes it again. The teacher gets no gradient and is never changed. Where one output layer has rows of padding
behind the vocabulary, both distributions are over the rows that both have.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from rlhf_ray.algorithms.losses import Divergence
from rlhf_ray.models.forward.log_probs import LogProbHead, chunk_size
from rlhf_ray.models.forward.packed import distinct, read_forward
from rlhf_ray.models.forward.rotation import share_alike
from rlhf_ray.trajectories.packing import Packed


class Teacher:
    """A frozen language model beside a policy in one process; ``actor`` has a ``backbone`` and a ``log_prob_head``."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor.eval().requires_grad_(False)

    def read_alike(self, packed: Packed) -> Packed:
        """Return the pack as this model can read it too."""
        return share_alike(self.actor.config, packed)

    @torch.no_grad()
    def hidden_states(self, packed: Packed, tokens: Int64[Tensor, "some"]) -> Float[Tensor, "some hidden"]:
        """Return the last hidden states of these tokens of the pack."""
        states = read_forward(self.actor.backbone, packed, distinct(tokens, packed.num_tokens))
        return states.index_select(0, tokens)

    def divergences(
        self,
        head: LogProbHead,
        hidden: Float[Tensor, "tokens hidden"],
        own: Float[Tensor, "tokens own_hidden"],
        divergence: Divergence,
    ) -> Float[Tensor, "tokens"]:
        """Return the divergence of each token in nats, with a gradient for the policy: ``head`` and ``hidden`` are its own.

        ``own`` are the hidden states of this model at the same places.
        """
        mine: LogProbHead = self.actor.log_prob_head

        def of_chunk(states: Tensor, of_teacher: Tensor) -> Tensor:
            with torch.no_grad():
                theirs = _log_probs(mine, of_teacher, divergence.temperature, min(len(head.weight), len(mine.weight)))
            return divergence(_log_probs(head, states, divergence.temperature, theirs.shape[1]), theirs)

        size = chunk_size(len(head.weight), on_gpu=hidden.is_cuda)
        parts = [
            checkpoint(of_chunk, states, of_teacher, use_reentrant=False, preserve_rng_state=False)
            for states, of_teacher in zip(hidden.split(size), own.split(size), strict=True)
        ]
        return torch.cat(parts)


def _log_probs(
    head: LogProbHead, hidden: Float[Tensor, "tokens hidden"], temperature: float, rows: int
) -> Float[Tensor, "tokens rows"]:
    """Return log-probabilities over the first ``rows`` of the vocabulary."""
    with torch.autocast(hidden.device.type, enabled=False):
        weight, bias = head.weight[:rows], None if head.bias is None else head.bias[:rows]
        if head.fp32:
            hidden, weight, bias = hidden.float(), weight.float(), None if bias is None else bias.float()
        logits = head.capped(functional.linear(hidden, weight, bias).float())
        return (logits / temperature).log_softmax(-1)
