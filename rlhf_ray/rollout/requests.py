"""The requests that a rollout engine takes and the generations that it returns: token ids in, token ids out.

Invariants:

- A request is identified by its prompt and its sample index.
- Its seed is a pure function of the run's seed, the step, the prompt and the sample, so every engine draws the same numbers
  for it, however often it is generated.
- A generation has one log-prob and one weight version for every sampled token, the end of sequence included, and where the
  distribution was cut the set that was kept.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

from rlhf_ray.errors import RequestError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from rlhf_ray.trajectories.batch import TrajectoryBatch
    from rlhf_ray.trajectories.columns import FinishReason
    from rlhf_ray.trajectories.kept_sets import KeptSets

Key = tuple[int, int]
"""Prompt id and sample index."""
NO_VERSION = -1
"""The weight version of prompt tokens, which no weights sampled."""


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One sample to draw. Without a seed the engine uses its own random stream."""

    prompt_id: int
    sample_index: int
    token_ids: tuple[int, ...]
    seed: int | None
    max_new_tokens: int
    greedy: bool = False
    """Take the most likely token each time. Log-probs are then those at temperature 1."""

    @property
    def key(self) -> Key:
        """What identifies this request among others."""
        return self.prompt_id, self.sample_index


@dataclass(frozen=True, slots=True)
class Generation:
    """The tokens that were sampled for one request."""

    prompt_id: int
    sample_index: int
    token_ids: tuple[int, ...]
    log_probs: tuple[float, ...]
    """At the sampling temperature, over ``kept``."""
    weight_versions: tuple[int, ...]
    finish_reason: FinishReason
    kept: KeptSets | None = None
    """The set among which each token was sampled; None where it was the whole vocabulary each time."""
    routed: NDArray[Any] | None = field(default=None, compare=False)
    """The experts that each token of prompt and answer, but the last, was sent to, (tokens - 1, routers, experts of a token);
    None where nobody replays them."""

    @property
    def key(self) -> Key:
        """The key of the request."""
        return self.prompt_id, self.sample_index


@dataclass(frozen=True, slots=True)
class Probe:
    """An engine's report about itself, made without computing anything."""

    dead: str | None
    """Why the engine is dead; None while it works."""
    weight_version: int
    unfinished: int


def request_seed(run_seed: int, step: int, prompt_id: int, sample_index: int) -> int:
    """A seed of 63 bits for one sample, the same on every machine."""
    digest = hashlib.blake2b(struct.pack("<4q", run_seed, step, prompt_id, sample_index), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def make_requests(
    prompts: Sequence[tuple[int, Sequence[int]]],
    *,
    samples_per_prompt: int,
    max_new_tokens: int,
    run_seed: int | None = None,
    step: int = 0,
    greedy: bool = False,
) -> list[GenerationRequest]:
    """Requests of ``(prompt id, token ids)`` in order, the samples of a prompt together; seeded if ``run_seed`` is."""
    return [
        GenerationRequest(
            prompt_id,
            sample,
            tuple(token_ids),
            None if run_seed is None else request_seed(run_seed, step, prompt_id, sample),
            max_new_tokens,
            greedy,
        )
        for prompt_id, token_ids in prompts
        for sample in range(samples_per_prompt)
    ]


def check_requests(
    requests: Sequence[GenerationRequest],
    *,
    vocabulary: int,
    max_model_tokens: int,
    seeded: bool,
    unfinished: Collection[Key] = (),
) -> None:
    """Raise :class:`RequestError` if one of ``requests`` cannot be served."""
    seen = set(unfinished)
    for request in requests:
        where = f"request for prompt {request.prompt_id}, sample {request.sample_index}"
        if request.key in seen:
            raise RequestError(f"{where}: asked for twice; give each sample of a prompt an index of its own")
        seen.add(request.key)
        total = len(request.token_ids) + request.max_new_tokens
        if not request.token_ids:
            raise RequestError(f"{where}: the prompt has no tokens; give it at least one")
        if request.max_new_tokens < 1:
            raise RequestError(f"{where}: max_new_tokens is {request.max_new_tokens}; it must be at least 1")
        if total > max_model_tokens:
            raise RequestError(
                f"{where}: {len(request.token_ids)} prompt tokens and {request.max_new_tokens} new ones are {total}, "
                f"more than rollout.max_model_tokens ({max_model_tokens}); raise it or shorten the prompt"
            )
        wrong = [token for token in request.token_ids if not 0 <= token < vocabulary]
        if wrong:
            raise RequestError(f"{where}: token {wrong[0]} is not in the model's vocabulary of {vocabulary}")
        if seeded and request.seed is None:
            raise RequestError(f"{where}: has no seed, but the run is deterministic; make requests with the run's seed")


def gather(requests: Sequence[GenerationRequest], generations: Sequence[Generation]) -> TrajectoryBatch:
    """Join prompts and their generations into one batch, in the order of ``requests``."""
    import numpy as np

    from rlhf_ray.trajectories.batch import TrajectoryBatch

    pairs = list(zip(requests, generations, strict=True))
    prompt_lengths = np.array([len(request.token_ids) for request, _ in pairs], np.int64)
    new_lengths = np.array([len(generation.token_ids) for _, generation in pairs], np.int64)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(prompt_lengths + new_lengths)])
    sampled = np.repeat(np.tile([False, True], len(pairs)), np.stack([prompt_lengths, new_lengths], 1).ravel())

    def column(values: Sequence[tuple[float, ...]], dtype: type, fill: float) -> np.ndarray[Any, Any]:
        out: np.ndarray[Any, Any] = np.full(int(offsets[-1]), fill, dtype)
        out[sampled] = np.fromiter(chain.from_iterable(values), dtype)
        return out

    kept: dict[str, np.ndarray[Any, Any]] = {}
    if any(generation.kept is not None for _, generation in pairs):
        from rlhf_ray.trajectories.kept_sets import KeptSets

        own = [generation.kept or KeptSets.whole(len(generation.token_ids)) for _, generation in pairs]
        kept["kept_sizes"] = column([tuple(sets.sizes.tolist()) for sets in own], np.int32, 0)
        kept["kept_words"] = np.concatenate([sets.words.numpy() for sets in own])
    routed = [generation.routed for _, generation in pairs if generation.routed is not None]
    if routed:
        import torch

        from rlhf_ray.trajectories.routed_experts import complete

        lengths = (prompt_lengths + new_lengths).tolist()
        kept["routed_experts"] = complete([torch.from_numpy(own) for own in routed], lengths).numpy()
    token_ids = chain.from_iterable(chain(request.token_ids, generation.token_ids) for request, generation in pairs)
    return TrajectoryBatch.from_arrays(
        {
            "offsets": offsets,
            "token_ids": np.fromiter(token_ids, np.int64),
            "action_mask": sampled,
            "weight_version": column([generation.weight_versions for _, generation in pairs], np.int32, NO_VERSION),
            **kept,
            "rollout_log_probs": column([generation.log_probs for _, generation in pairs], np.float32, 0.0),
            "prompt_id": np.array([request.prompt_id for request, _ in pairs], np.int64),
            "sample_index": np.array([request.sample_index for request, _ in pairs], np.int32),
            "finish_reason": np.array([int(generation.finish_reason) for _, generation in pairs], np.int8),
        }
    )
