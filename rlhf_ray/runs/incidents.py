"""The incidents of a run: each event that cost it time, or that it survived, and what was done about it.

Invariants: an incident is on disk once the run goes on, or before it ends. Lines are never moved aside: time that was lost
stays lost, also where the run went back to an earlier commit. A torn last line, which a crash leaves, is ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rlhf_ray.runs.lines import count_problem, not_a, number_problem
from rlhf_ray.storage.jsonl import JsonLines

Fault = Literal["died", "deadline", "error", "stalled", "numeric"]
Action = Literal["restarted", "rolled_back", "skipped", "stopped"]
START = "start"
"""The phase of what failed before the run had its trainer."""


@dataclass(frozen=True)
class Incident:
    """One event."""

    at: float
    """When it was noticed, in seconds since 1970."""
    step: int
    """The last finished step then."""
    phase: str
    """What the run was doing: the method that was called on the role, or a phase of the driver."""
    role: str
    """Whose failure it was, such as policy, reward-helpful or driver."""
    rank: int | None
    """Which of its ranks; None where no single one is to blame."""
    fault: Fault
    cause: str
    """Its first line."""
    action: Action
    back_to: int
    """The step from which the run went on."""
    lost_steps: int
    """How many finished steps are done again."""
    seconds: float
    """From noticing it until the run went on, or ended."""


class Incidents:
    """The file ``incidents.jsonl`` of a run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lines = JsonLines(self.path, incident_problem)

    def add(self, incident: Incident) -> None:
        """Add one; it is on disk when this returns."""
        first, *_ = incident.cause.strip().splitlines() or [""]
        self._lines.append({**asdict(incident), "cause": first})

    def remember(self) -> None:
        """From now on read each line once."""
        self._lines.remember()

    def read(self) -> list[Incident]:
        """All of them, in order; none where the file does not exist."""
        return [Incident(**{name: line[name] for name in Incident.__dataclass_fields__}) for line in self._lines.read()]


def incident_problem(line: Mapping[str, Any]) -> str:
    """What is wrong with a line; empty if nothing is."""
    for name in ("step", "back_to", "lost_steps"):
        if problem := count_problem(line, name):
            return problem
    for name in ("at", "seconds"):
        if problem := number_problem(line, name):
            return problem
    for name in ("phase", "role", "cause"):
        if not isinstance(line.get(name), str):
            return not_a(line, name, "a text")
    if "rank" not in line or (line["rank"] is not None and count_problem(line, "rank")):
        return not_a(line, "rank", "a whole number or null")
    for name, values in (("fault", get_args(Fault)), ("action", get_args(Action))):
        if line.get(name) not in values:
            return not_a(line, name, f"one of {', '.join(values)}")
    return ""
