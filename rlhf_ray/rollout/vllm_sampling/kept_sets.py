"""The set among which a vLLM engine sampled each token, where min-p, top-k or top-p cut the vocabulary.

Invariants: a request ends with one set for each of its tokens, which holds the token, or the engine dies of a
:class:`ValueError`. A greedy request is cut by nothing, but for an engine on a GPU, where its only choice is its set.

On a GPU vLLM 0.32 returns the sets itself (``return_sampling_mask``), for requests with ``top_k`` above 0; that has not run on
a GPU yet. Its runner on CPU has no such interface, so there a forward hook on the last module of its sampler
(``model_runner.sampler.topk_topp_sampler``) reads what it keeps: its second output, the log-probs that were sampled from, is
minus infinity elsewhere. Row i is of request ``model_runner.input_batch.req_ids[i]``, which is the id that the request was
added with and a suffix. ``tests/rollout/test_kept_sets.py`` fails when any of this changes.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf_ray.trajectories.kept_sets import KeptSets

if TYPE_CHECKING:
    from rlhf_ray.config.sections.rollout import RolloutConfig


def sampling_cuts(config: RolloutConfig, *, greedy: bool, on_cpu: bool) -> dict[str, Any]:
    """Return the arguments of ``SamplingParams`` that say from which distribution a request samples."""
    if greedy and (on_cpu or not config.cuts):
        return {"temperature": 0.0}
    # For a request without temperature vLLM returns no sets: among one token there is no other choice.
    top_k = 1 if greedy else config.top_k
    return {"temperature": config.temperature, "top_k": top_k, "top_p": config.top_p, "min_p": config.min_p}


class KeptInWorker:
    """The part of a worker extension that remembers the sets of unfinished requests, by the ids they were added with."""

    model_runner: Any

    def watch_kept(self) -> None:
        """Look at the sampler from now on."""
        self.kept_rows: dict[str, list[tuple[int, KeptSets]]] = defaultdict(list)
        self.model_runner.sampler.topk_topp_sampler.register_forward_hook(self._remember)

    def take_kept(self, request: str) -> tuple[list[int], KeptSets] | None:
        """Return and forget the tokens that were sampled for a request, and their sets; None where none were."""
        rows = self.kept_rows.pop(request, None)
        return None if rows is None else ([token for token, _ in rows], KeptSets.join([kept for _, kept in rows]))

    def forget_kept(self) -> None:
        """Forget the sets of all requests."""
        self.kept_rows.clear()

    def _remember(self, module: torch.nn.Module, arguments: Any, output: tuple[Tensor, Tensor | None]) -> None:
        sampled, log_probs = output
        requests = self.model_runner.input_batch.req_ids
        if log_probs is None or len(log_probs) != len(requests):
            rows = 0 if log_probs is None else len(log_probs)
            raise ValueError(f"vLLM's sampler gave {rows} rows of log-probs for {len(requests)} requests")
        kept = KeptSets.from_mask(log_probs > -torch.inf)
        for row, (request, token) in enumerate(zip(requests, sampled.tolist(), strict=True)):
            self.kept_rows[request.rpartition("-")[0]].append((token, kept.select(slice(row, row + 1))))


class KeptInEngine:
    """How an engine comes by the sets of its requests."""

    def __init__(self, engine: Any, *, vocabulary: int, on_cpu: bool) -> None:
        self._engine = engine
        self._vocabulary = vocabulary
        self._on_cpu = on_cpu
        if on_cpu:
            engine.collective_rpc("watch_kept")

    def take(self, request: str, output: Any, *, greedy: bool) -> KeptSets:
        """Return the set of each token of a finished request.

        Raises :class:`ValueError` where one is missing, or does not hold its token.
        """
        token_ids = list(output.token_ids)
        if not self._on_cpu:
            kept = KeptSets.from_ids(output.sampling_mask.token_ids, self._vocabulary)
            if len(kept) != len(token_ids) or not kept.contains(token_ids):
                raise ValueError(
                    f"vLLM gave {len(kept)} sets for {len(token_ids)} tokens, or others than it sampled from"
                )
            return kept
        found = next((rows for rows in self._engine.collective_rpc("take_kept", args=(request,)) if rows), None)
        if greedy:
            return KeptSets.whole(len(token_ids))
        sampled, kept = found or ([], KeptSets.whole(0))
        if sampled != token_ids or not kept.contains(token_ids):
            raise ValueError(
                f"the sets of {len(sampled)} tokens were seen in vLLM's sampler, but it answered with {len(token_ids)} "
                "tokens, or others"
            )
        return kept

    def forget(self) -> None:
        """Forget all unfinished requests."""
        if self._on_cpu:
            self._engine.collective_rpc("forget_kept")
