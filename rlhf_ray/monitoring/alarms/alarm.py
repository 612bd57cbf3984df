"""An alarm: a condition over metrics, what it means, and the way out.

Invariants: an alarm that another one explains does not hold while that one does. Advice does not hold while any alarm does: the
same number means another thing in a run that is broken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf_ray.monitoring.alarms.conditions import GAP_S, Condition, Series
from rlhf_ray.monitoring.alarms.readings import Readings

Severity = Literal["critical", "warning", "advice"]
SEVERITIES: tuple[Severity, ...] = ("critical", "warning", "advice")
"""The gravest first: the run does not go on; it goes on with a loss; it could learn better."""


@dataclass(frozen=True)
class Alarm:
    """What a metric may carry."""

    name: str
    severity: Severity
    condition: Condition
    meaning: str
    """What is the matter, in a sentence."""
    way_out: str
    """What to do, in a sentence or two."""
    explained_by: tuple[str, ...] = ()
    """Alarms that say more of the same."""
    from_step: int = 0
    """The first step at whose end it may hold."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """What it reads."""
        return (*self.condition.metrics, *(("step",) if self.from_step else ()))

    def is_true(self, readings: Readings, at: float) -> bool:
        """Whether its own condition holds, whatever other alarms say."""
        return self._is_late_enough(readings, at) and self.condition.holds(readings, at)

    def _is_late_enough(self, readings: Readings, at: float) -> bool:
        return not self.from_step or (readings.value("step", at) or 0.0) >= self.from_step

    def query(self, series: Series) -> str:
        """When it holds, for Prometheus, in whose group of rules those that explain it come before it."""
        query = self.condition.query(series)
        if self.from_step:
            step = f"max by (run) (last_over_time({series('step')}[{GAP_S}s]))"
            query = f"({query}) and {step} >= {self.from_step}"
        if self.explained_by:
            query = (
                f'({query}) unless on (run) ALERTS{{alertstate="firing", alertname=~"{"|".join(self.explained_by)}"}}'
            )
        if self.severity == "advice":
            query = f'({query}) unless on (run) ALERTS{{alertstate="firing", severity=~"critical|warning"}}'
        return query


def in_order(alarms: Sequence[Alarm]) -> list[Alarm]:
    """Alarms before what they explain, and advice last; raises ``ValueError`` where a name is unknown or explains itself."""
    known = {alarm.name: alarm for alarm in alarms}
    ordered: dict[str, Alarm] = {}

    def add(alarm: Alarm, waiting: tuple[str, ...]) -> None:
        if alarm.name in waiting or not {*alarm.explained_by} <= known.keys():
            raise ValueError(f"alarm {alarm.name} is explained by itself, or by one that is not there")
        for name in alarm.explained_by:
            add(known[name], (*waiting, alarm.name))
        ordered.setdefault(alarm.name, alarm)

    for severity in SEVERITIES:
        for alarm in alarms:
            if alarm.severity == severity:
                add(alarm, ())
    return list(ordered.values())


def holding(alarms: Sequence[Alarm], readings: Readings, at: float) -> list[Alarm]:
    """The alarms that hold at a moment, the gravest first; ``alarms`` as :func:`in_order` gives them."""
    held: dict[str, Alarm] = {}
    for alarm in alarms:
        if held.keys() & {*alarm.explained_by}:
            continue
        if alarm.severity == "advice" and any(other.severity != "advice" for other in held.values()):
            continue
        if alarm.is_true(readings, at):
            held[alarm.name] = alarm
    return sorted(held.values(), key=lambda alarm: SEVERITIES.index(alarm.severity))
