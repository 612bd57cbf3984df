"""Conditions over the metrics of a run, each of which can be evaluated here and written as a query of Prometheus.

Invariants: both say the same, but for what Prometheus learns later: a value with its next scrape, the end of a state after
``GAP_S``. A condition over what is not known does not hold. No condition over a state ends because the state was missing for
less than ``GAP_S``: what Ray exports vanishes 20 s after it was last set. A counter that Prometheus first sees above 0 has
grown by all of it: Ray's counters are born with the first event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Protocol

from rlhf_ray.console import duration
from rlhf_ray.monitoring.alarms.readings import Readings

GAP_S = 120
"""For so long a state counts as what it was last seen as."""
REMEMBERED_S = 3600
"""For so long a run that gives no sign of life is known in Prometheus."""

Series = Callable[[str], str]
"""The series in Prometheus of a metric."""


class Condition(Protocol):
    """Something that holds at a moment, or does not."""

    @property
    def metrics(self) -> tuple[str, ...]:
        """What it is about."""

    def holds(self, readings: Readings, at: float) -> bool:
        """Whether it holds at a moment."""

    def query(self, series: Series) -> str:
        """An expression of Prometheus with a sample, labelled ``run``, for each run in which it holds."""

    def words(self) -> str:
        """When it holds, in a phrase of Markdown."""

    def reading(self, readings: Readings, at: float) -> str:
        """What is read at a moment at which it holds, in a phrase."""


@dataclass(frozen=True)
class _Beyond:
    """A state is on one side of a limit, and has been for all of ``held_s`` seconds; the limit may be a state too."""

    metric: str
    limit: float | str
    held_s: int = 0
    _side: ClassVar[str]
    _sign: ClassVar[str]
    _direction: ClassVar[int]
    """1 where it is the least of the values that says whether all are beyond the limit, -1 where it is the most."""
    _nearest: ClassVar[str]
    """That value, as Prometheus calls it."""
    _of_many: ClassVar[str]
    """Which one counts where several series say what the state is now."""

    @property
    def metrics(self) -> tuple[str, ...]:
        return _metrics(self.metric, self.limit)

    def holds(self, readings: Readings, at: float) -> bool:
        limit, values = _limit(readings, self.limit, at), _held(readings, self.metric, self.held_s, at)
        if limit is None or not values:
            return False
        return min(self._direction * value for value in values) > self._direction * limit

    def query(self, series: Series) -> str:
        name = series(self.metric)
        over = f"{self._nearest} by (run) ({self._nearest}_over_time({name}[{self.held_s}s]))"
        value = over if self.held_s else _last(self._of_many, name)
        return f"{value} {self._sign} {_written(self.limit, series)}{_known(name, self.held_s)}"

    def words(self) -> str:
        return f"`{self.metric}` is {self._side} {_limit_words(self.limit)}{_held_words(self.held_s)}"

    def reading(self, readings: Readings, at: float) -> str:
        return _compared(readings, self.metric, self._side, self.limit, at)


class Above(_Beyond):
    """A state is above a limit, and has been for all of ``held_s`` seconds; the limit may be a state too."""

    _side, _sign, _direction, _nearest, _of_many = "above", ">", 1, "min", "max"


class Below(_Beyond):
    """A state is below a limit, and has been for all of ``held_s`` seconds; the limit may be a state too."""

    _side, _sign, _direction, _nearest, _of_many = "below", "<", -1, "max", "min"


@dataclass(frozen=True)
class Counted:
    """More than ``more_than`` was counted in the last ``within_s`` seconds."""

    metric: str
    within_s: int
    more_than: float = 0.0

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    def holds(self, readings: Readings, at: float) -> bool:
        return readings.counted(self.metric, at - self.within_s, at) > self.more_than

    def query(self, series: Series) -> str:
        now = f"last_over_time({series(self.metric)}[{GAP_S}s])"
        before = f"last_over_time({series(self.metric)}[{GAP_S}s] offset {self.within_s}s)"
        return f"sum by (run) ({now} - {before} or {now} unless {before}) > {self.more_than:g}"

    def words(self) -> str:
        least = f" by more than {self.more_than:g}" if self.more_than else ""
        return f"`{self.metric}` has grown{least} within {duration(self.within_s)}"

    def reading(self, readings: Readings, at: float) -> str:
        count = readings.counted(self.metric, at - self.within_s, at)
        return f"{self.metric} has grown by {count:g} in {duration(self.within_s)}"


@dataclass(frozen=True)
class Changed:
    """A state is more than ``factor`` times, or less than that part of, what it was ``within_s`` seconds ago."""

    metric: str
    factor: float
    within_s: int

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    def holds(self, readings: Readings, at: float) -> bool:
        now, before = readings.value(self.metric, at), readings.value(self.metric, at - self.within_s)
        return now is not None and before is not None and not before / self.factor <= now <= before * self.factor

    def query(self, series: Series) -> str:
        name = series(self.metric)
        now, before = _last("max", name), _last("max", name, self.within_s)
        return f"({now} > {self.factor:g} * {before}) or ({self.factor:g} * {now} < {before})"

    def words(self) -> str:
        ago = f"{duration(self.within_s)} ago"
        return f"`{self.metric}` is {self.factor:g} times what it was {ago}, or 1/{self.factor:g} of it"

    def reading(self, readings: Readings, at: float) -> str:
        now, before = readings.value(self.metric, at), readings.value(self.metric, at - self.within_s)
        return f"{self.metric} is {_number(now)}, and was {_number(before)} {duration(self.within_s)} ago"


@dataclass(frozen=True)
class Silent:
    """A state that is above 0 for as long as a run lives, and below once it has ended in order, was not read for ``for_s``.

    The highest value is that of the newest attempt. In Prometheus a run whose node is not there any more is not silent: that
    its page does not answer, Prometheus says by itself.
    """

    metric: str
    for_s: int

    @property
    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    def holds(self, readings: Readings, at: float) -> bool:
        return (readings.value(self.metric, at) or 0.0) > 0.0 and at - readings.seen(self.metric, at) > self.for_s

    def query(self, series: Series) -> str:
        last = f"last_over_time({series(self.metric)}[{REMEMBERED_S}s])"
        lived = f"max by (run) ({last} and on (instance) up == 1) == max by (run) (abs({last}))"
        return f"({lived}) unless max by (run) (last_over_time({series(self.metric)}[{self.for_s}s]))"

    def words(self) -> str:
        return f"no sign of life (`{self.metric}`) for {duration(self.for_s)}"

    def reading(self, readings: Readings, at: float) -> str:
        return f"the last sign of life was {duration(at - readings.seen(self.metric, at))} ago"


@dataclass(frozen=True)
class Either:
    """One of two conditions holds, or both."""

    first: Condition
    second: Condition

    @property
    def metrics(self) -> tuple[str, ...]:
        return (*self.first.metrics, *self.second.metrics)

    def holds(self, readings: Readings, at: float) -> bool:
        return self.first.holds(readings, at) or self.second.holds(readings, at)

    def query(self, series: Series) -> str:
        return f"({self.first.query(series)}) or ({self.second.query(series)})"

    def words(self) -> str:
        return f"{self.first.words()}, or {self.second.words()}"

    def reading(self, readings: Readings, at: float) -> str:
        held = [one for one in (self.first, self.second) if one.holds(readings, at)]
        return ", ".join(one.reading(readings, at) for one in held)


def _metrics(metric: str, limit: float | str) -> tuple[str, ...]:
    return (metric, limit) if isinstance(limit, str) else (metric,)


def _limit(readings: Readings, limit: float | str, at: float) -> float | None:
    return readings.value(limit, at) if isinstance(limit, str) else limit


def _last(aggregate: str, name: str, ago_s: int = 0) -> str:
    offset = f" offset {ago_s}s" if ago_s else ""
    return f"{aggregate} by (run) (last_over_time({name}[{GAP_S}s]{offset}))"


def _written(limit: float | str, series: Series) -> str:
    return _last("max", series(limit)) if isinstance(limit, str) else f"{limit:g}"


def _held(readings: Readings, metric: str, held_s: int, at: float) -> list[float]:
    """What the state was in the last seconds; empty where it is not known at their beginning or end."""
    if readings.value(metric, at) is None:
        return []
    return list(readings.held(metric, at - held_s, at))


def _known(name: str, held_s: int) -> str:
    """That a state is known now, and was so many seconds ago."""
    return f" and {_last('max', name, held_s)} and {_last('max', name)}" if held_s else ""


def _compared(readings: Readings, metric: str, how: str, limit: float | str, at: float) -> str:
    named = f" ({limit})" if isinstance(limit, str) else ""
    return f"{metric} is {_number(readings.value(metric, at))}, {how} {_number(_limit(readings, limit, at))}{named}"


def _limit_words(limit: float | str) -> str:
    return f"`{limit}`" if isinstance(limit, str) else f"{limit:g}"


def _held_words(held_s: int) -> str:
    return f" for {duration(held_s)}" if held_s else ""


def _number(value: float | None) -> str:
    return "not known" if value is None else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
