"""Sample in a vLLM engine on a CPU with one random number a token, and report its log-prob without its rank.

Invariants: a token is drawn with the probability that its returned log-prob says, from nothing but its own row and its own
random stream: a request with a seed gets the same tokens whatever runs beside it. A token of probability 0 is never drawn.
The log-prob of a drawn token is what vLLM would report, to the bit.

vLLM 0.32 draws Gumbel noise for the whole vocabulary on a CPU (``TopKTopPSampler.forward_cpu``): 2 million numbers a step for
64 answers over 32,000 tokens, much of the time of a small model. It has no interface to sample otherwise, so the forward of
that module (``model_runner.sampler.topk_topp_sampler``) is replaced on the instance; its arguments and results stay the same.
With each log-prob it also counts how many tokens are likelier, which nobody here reads and no setting leaves out. So the
sampler's ``gather_logprobs`` is replaced too. ``tests/rollout/test_inverse_transform.py`` fails when vLLM changes them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

BLOCK = 256
"""Tokens whose probabilities are summed first, in fp32: the sums of few numbers lose no small ones."""
BELOW_ONE = 1.0 - 2.0**-52


class InverseTransformInWorker:
    """The part of a worker extension that replaces the way in which its sampler draws and reports."""

    model_runner: Any

    def sample_by_inverse_transform(self) -> None:
        """Draw one random number a token, and count no ranks, from now on."""
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        def forward(
            logits: Tensor, generators: Mapping[int, torch.Generator], k: Tensor | None, p: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            log_probs = apply_top_k_top_p(logits, k, p).log_softmax(-1, dtype=torch.float32)
            return draw(log_probs, uniform(len(log_probs), generators)), log_probs

        sampler = self.model_runner.sampler
        sampler.topk_topp_sampler.forward = forward
        sampler.gather_logprobs = partial(gather_log_probs, sampler.gather_logprobs)


def gather_log_probs(
    with_ranks: Callable[[Tensor, int, Tensor], Any],
    logprobs: Float[Tensor, "rows vocabulary"],
    num_logprobs: int,
    token_ids: Int64[Tensor, "rows"],
) -> Any:
    """Return vLLM's ``LogprobsTensors`` of the tokens alone, with ranks of 0, which are none: the first is 1.

    Where other tokens are asked for beside them, ``with_ranks``, vLLM's own, answers.
    """
    from vllm.v1.outputs import LogprobsTensors

    if num_logprobs != 0:
        return with_ranks(logprobs, num_logprobs, token_ids)
    tokens = token_ids[:, None]
    return LogprobsTensors(tokens.int(), logprobs.gather(1, tokens), torch.zeros_like(token_ids))


def uniform(rows: int, generators: Mapping[int, torch.Generator]) -> Float[Tensor, "rows"]:
    """Return a random number in [0, 1) for each row, from the row's own generator where it has one."""
    numbers = torch.rand(rows, dtype=torch.float64)
    for row, generator in generators.items():
        numbers[row] = torch.rand((), generator=generator, dtype=torch.float64)
    return numbers


def draw(log_probs: Float[Tensor, "rows vocabulary"], numbers: Float[Tensor, "rows"]) -> Int64[Tensor, "rows"]:
    """Return in each row the first token up to which the probabilities sum to more than its number's share of their sum."""
    rows, vocabulary = log_probs.shape
    probabilities = log_probs.new_empty(rows, -(-vocabulary // BLOCK) * BLOCK)
    torch.exp(log_probs, out=probabilities[:, :vocabulary])
    probabilities[:, vocabulary:] = 0.0
    blocks = probabilities.view(rows, -1, BLOCK)
    block, share = _first_above(blocks.sum(-1), numbers)
    token, _ = _first_above(blocks[torch.arange(rows), block], share)
    return block * BLOCK + token


def _first_above(
    weights: Float[Tensor, "rows columns"], share: Float[Tensor, "rows"]
) -> tuple[Int64[Tensor, "rows"], Float[Tensor, "rows"]]:
    """Return the first column up to which weights sum to more than ``share`` of the whole, and which share of it is left."""
    sums = weights.double().cumsum(-1)
    wanted = (share.clamp(max=BELOW_ONE) * sums[:, -1])[:, None]
    column = torch.searchsorted(sums, wanted, right=True)
    own = weights.double().gather(1, column)
    return column[:, 0], ((wanted - (sums.gather(1, column) - own)) / own)[:, 0].clamp(0.0, BELOW_ONE)
