"""How the prompts of a call are cut into shares, and what is known of a share that failed.

Invariant: all samples of a prompt are in the same share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from rlhf_ray.rollout.requests import GenerationRequest

Share = Sequence[GenerationRequest]


def cut_shares(requests: Share, places: int) -> list[list[GenerationRequest]]:
    """Cut into ``places`` shares of neighbouring prompts, of sizes that differ by at most one prompt.

    All samples of a prompt are in the same share.
    """
    prompts = [list(group) for _, group in groupby(requests, key=lambda request: request.prompt_id)]
    bounds = [len(prompts) * place // places for place in range(places + 1)]
    return [[request for prompt in prompts[start:stop] for request in prompt] for start, stop in pairwise(bounds)]


@dataclass(frozen=True)
class Work:
    """A share, and which processes failed at it."""

    requests: Share
    home: int
    """The engine whose share it is, or is a part of."""
    lost: tuple[tuple[int, int], ...] = ()
    """Engines and their incarnations."""
    causes: tuple[str, ...] = ()

    @property
    def prompts(self) -> set[int]:
        """The ids of its prompts."""
        return {request.prompt_id for request in self.requests}

    def prompt_by_prompt(self) -> list[Work]:
        """The same as one share for each prompt."""
        groups = groupby(self.requests, key=lambda request: request.prompt_id)
        return [replace(self, requests=list(group)) for _, group in groups]


@dataclass(frozen=True)
class SetAside:
    """A prompt with which as many engines died as ``causes`` has entries."""

    prompt_id: int
    token_ids: tuple[int, ...]
    causes: tuple[str, ...]
