"""What all engines of a fleet keep to: the execution contract with the trainer, and with each other.

Invariant: an engine is in breach from the first answer on in which a field differs that must be equal, from the policy's record
in the last publication or from that of the first engine which answered. Nothing is compared before a publication carries one.
A warning is said once.
"""

from __future__ import annotations

from rlhf_ray.console import get_logger
from rlhf_ray.errors import RequestError
from rlhf_ray.rollout.execution import Execution, differences


class Contract:
    """The records that engines are compared with."""

    def __init__(self) -> None:
        self.policy: Execution | None = None
        """How the trainer computes log-probs, by its last publication."""
        self._first: tuple[int, Execution] | None = None
        """The engine that answered first, and its record."""
        self._said: set[str] = set()

    def breach(self, engine: int, record: Execution | None) -> str:
        """What of an engine's ``record`` must be equal and is not; empty where it keeps to the contract."""
        if self.policy is None:
            return ""
        if record is None:
            return "it does not say how it computes log-probs"
        number, first = self._first or (engine, record)
        broken, noted = differences(record, self.policy, "across", here="the engine", there="the policy")
        among, unlike = differences(record, first, "alike", here="the engine", there=f"engine {number}")
        if broken or among:
            return f"it does not compute log-probs as the others do: {'; '.join(broken + among)}"
        self._first = number, first
        for text in noted + unlike:
            if text not in self._said:
                self._said.add(text)
                get_logger("rollout.fleet").warning("engine %d: %s", engine, text)
        return ""

    def require(self, policy: Execution, records: dict[int, Execution]) -> Execution:
        """The record of the first engine; raises :class:`RequestError` where one of them is in breach."""
        self.policy = policy
        for engine, record in records.items():
            if breach := self.breach(engine, record):
                raise RequestError(f"rollout engine {engine}: {breach}")
        return next(iter(records.values()))
