"""Decide which updates stand out from those before them, and when too many were skipped.

Invariants: what is decided depends on the config and on the updates before alone, so that a resumed run decides as the run
would have. Only updates that were applied count as ordinary, so that no skipped one moves what is compared with. Nothing is
compared before half of ``guards.window`` updates were applied. The state is plain JSON.

A number stands out if it is more than ``k`` robust standard deviations above the median of the last ``guards.window`` applied
updates. OLMo-core's ``SkipStepOptimizer`` skips steps in the same way, by mean and standard deviation; median and MAD (median
absolute deviation) do not move with the outliers that they are to find.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from itertools import takewhile
from statistics import median
from typing import Any

from rlhf_ray.config.sections.guards import GuardsConfig

ROBUST = 1.4826
"""The standard deviation of a normal distribution over its MAD."""
LEAST_SPREAD = 0.05
"""Of the median: the least standard deviation, so that numbers that hardly vary may move a little."""
LOSS, GRADIENT_NORM, KL = "loss/", "grad_norm/", "kl/"
"""Beginnings of the names that numbers have here; the rest is the role."""


def upper_limit(history: Sequence[float], factor: float) -> float:
    """The value ``factor`` robust standard deviations above the median of ``history``, which is not empty."""
    middle = median(history)
    spread = ROBUST * median(abs(value - middle) for value in history)
    return middle + factor * max(spread, LEAST_SPREAD * abs(middle))


class Guards:
    """The guards of one run and what they remember."""

    def __init__(self, config: GuardsConfig) -> None:
        self.config = config
        self.went_back = 0
        """How often the run took up the weights of an earlier commit."""
        self._history: dict[str, deque[float]] = {}
        self._recent: deque[int] = deque(maxlen=config.window)
        """For each of the last updates the step that it was skipped in, 0 for one that was applied."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Guards) and (self.config, self.state()) == (other.config, other.state())

    @property
    def skipped(self) -> int:
        """How many of the last ``window`` updates were skipped."""
        return sum(step > 0 for step in self._recent)

    @property
    def first_skip(self) -> int:
        """The step of the first of these, or, within the budget, of the last ones in a row; 0 where there is none."""
        if self.spent:
            return next(step for step in self._recent if step > 0)
        in_a_row = tuple(takewhile(bool, reversed(self._recent)))
        return in_a_row[-1] if in_a_row else 0

    @property
    def may_go_back_before(self) -> int:
        """The step of the oldest skip that the run may go back before, sooner or later; 0 where there is none."""
        if self.config.on_budget != "go_back":
            return 0
        return self.first_skip if self.config.budget is None else next(filter(None, self._recent), 0)

    @property
    def spent(self) -> bool:
        """Whether more of the last updates were skipped than ``budget`` allows."""
        return self.config.budget is not None and self.skipped > self.config.budget

    def limit(self, name: str) -> float:
        """The largest ordinary value of a number; Inf where it is not guarded, or not yet."""
        if name.startswith(KL):
            return math.inf if self.config.kl_above is None else self.config.kl_above
        factor = self.config.loss if name.startswith(LOSS) else self.config.gradient_norm
        history = self._history.get(name, ())
        if factor is None or len(history) < self.config.window // 2:
            return math.inf
        return upper_limit(tuple(history), factor)

    def outliers(self, values: Mapping[str, float]) -> list[str]:
        """One phrase for each of ``values`` that stands out. A NaN does not: it is skipped for what it is."""
        return [
            f"{name} {value:.4g} above {limit:.4g}"
            for name, value in values.items()
            if value > (limit := self.limit(name))
        ]

    def applied(self, values: Mapping[str, float]) -> None:
        """Remember an update that was applied, with its numbers."""
        self._recent.append(0)
        for name, value in values.items():
            if not name.startswith(KL) and math.isfinite(value):
                self._history.setdefault(name, deque(maxlen=self.config.window)).append(value)

    def skip(self, step: int) -> None:
        """Remember that an update of ``step``, counted from 1, was skipped."""
        self._recent.append(step)

    def forget_skips(self) -> None:
        """Begin anew to count skipped updates, since the run went back. What is ordinary stays known."""
        self.went_back += 1
        self._recent.clear()

    def state(self) -> dict[str, Any]:
        """What is remembered, as plain JSON."""
        history = {name: list(values) for name, values in self._history.items()}
        return {"history": history, "recent": list(self._recent), "went_back": self.went_back}

    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Take over what :meth:`state` returned; none, as in a checkpoint of a version without guards, is a new start."""
        if state is None:
            return
        self.went_back = int(state["went_back"])
        self._recent = deque(map(int, state["recent"]), maxlen=self.config.window)
        self._history = {name: deque(values, maxlen=self.config.window) for name, values in state["history"].items()}
