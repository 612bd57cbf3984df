"""Which answers of ranks are there, what is said of those that are late, and what ranks answered last.

Invariant: nothing here waits longer than it was told to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf_ray.monitoring.memory import TreeMemory


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


class MemoryOfRanks:
    """What memory ranks hold, as each of them said last. A rank has one question at a time to answer, however late it is."""

    def __init__(self) -> None:
        self._said: dict[Any, TreeMemory] = {}
        self._asked: dict[Any, Any] = {}

    def ask(self, actors: Sequence[Any], timeout_s: float) -> list[TreeMemory]:
        """Ask ``actors``; one that is late holds what it held before, and one that has died holds nothing."""
        import ray

        self._said = {actor: self._said[actor] for actor in actors if actor in self._said}
        self._asked = {actor: self._asked.get(actor) or actor.memory.remote() for actor in actors}
        waiting = list(self._asked.values())
        answered = set(ray.wait(waiting, num_returns=len(waiting), timeout=timeout_s)[0]) if waiting else set()
        for actor in [actor for actor, reference in self._asked.items() if reference in answered]:
            held = _value(self._asked.pop(actor), timeout_s)
            if held is None:
                self._said.pop(actor, None)
            else:
                self._said[actor] = held
        return list(self._said.values())


def _value(reference: Any, timeout_s: float) -> Any:
    """What a rank answered; None where it died or failed."""
    import ray
    from ray.exceptions import RayError

    try:
        return ray.get(reference, timeout=timeout_s)
    except RayError:
        return None
