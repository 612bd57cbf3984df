"""Sampled answers for tests of reward sources."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf_ray.rewards.sample import TextSample


def answer(
    prompt: str,
    response: str,
    label: str | None = None,
    *,
    finished: bool = True,
    token_ids: tuple[int, ...] = (),
    messages: tuple[Mapping[str, str], ...] | None = None,
) -> TextSample:
    """An answer to prompt 7, from source ``test``."""
    return TextSample(7, 0, prompt, response, label, finished, token_ids, "test", messages)
