"""Which answers of ranks are there, and what is said of those that are late.

Invariant: nothing here waits longer than it was told to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def are_there(references: Sequence[Any], timeout_s: float) -> bool:
    """Whether every rank has answered or failed, now or within ``timeout_s``."""
    import ray

    _, missing = ray.wait(list(references), num_returns=len(references), timeout=timeout_s)
    return not missing


def unanswered(references: Sequence[Any]) -> tuple[int, ...]:
    """The positions of those that are not there yet."""
    import ray

    _, missing = ray.wait(list(references), num_returns=len(references), timeout=0, fetch_local=False)
    late = set(missing)
    return tuple(number for number, reference in enumerate(references) if reference in late)


def why_late(late: Sequence[int], limit: float, key: str | None, last_answer: float | None) -> str:
    """Why a call has failed that the ranks ``late`` did not answer; ``last_answer`` is when the last of the others did."""
    text = f"ranks {list(late)} did not answer within {limit:g} s"
    if last_answer is not None:
        text += f", the others had after {last_answer:.1f} s"
    if key is None:
        return text
    return f"{text}. If they were still at work, raise {key}; if they hang, their logs say where"
