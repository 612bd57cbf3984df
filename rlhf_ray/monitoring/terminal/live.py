"""A run as it is now, for a terminal that is painted again and again, and for a log that takes one line after another.

Invariants: what is shown follows from the :class:`RunState` and the width alone. A log gets a line for what is new, and no line
where nothing is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from rich.table import Table
from rich.text import Text

from rlhf_ray.console import duration
from rlhf_ray.monitoring.registry import REGISTRY
from rlhf_ray.monitoring.spans.steps import StepLanes
from rlhf_ray.monitoring.terminal.drawing import Pen, plain, short
from rlhf_ray.monitoring.terminal.lanes import lanes_view

SHOWN = (
    "reward/learned",
    "gold/mean",
    "loss/sft",
    "loss/rm",
    "accuracy",
    "kl/k1",
    "entropy",
    "clip_fraction",
    "length/response",
    "truncated/share",
    "tokens_per_second",
    "rollout/tokens_per_second",
    "memory/pss_gb",
)
"""Metrics with a line of their own, where the run has them."""
IN_A_LINE = ("reward/learned", "loss/sft", "loss/rm", "accuracy", "kl/k1", "length/response", "tokens_per_second")
"""Metrics that a line of a log has."""
LAST_STEPS = 20
"""So many of the last steps make the pace and the shares of time."""
WITHOUT_CURVE, VALUE_WIDTH, SHORTEST_CURVE, LONGEST_CURVE = 52, 9, 8, 60
"""Columns of a metric's name, value and unit; of the value alone; and of a curve."""
OTHER_LINES = 8
"""Lines that lanes take besides themselves, at most."""
STYLES = {"critical": "bold red", "warning": "yellow", "advice": "cyan"}


@dataclass(frozen=True)
class Phase:
    """What the run is doing, for how many seconds, and how long that usually takes."""

    name: str
    seconds: float
    usual_s: float | None = None


@dataclass(frozen=True)
class RunAlarm:
    """An alarm that holds: ``severity`` is critical, warning or advice."""

    name: str
    severity: str
    meaning: str
    way_out: str


@dataclass(frozen=True)
class RunState:
    """What the files of a run say of it at one moment."""

    name: str
    kind: str
    state: str
    lines: Sequence[Mapping[str, Any]] = ()
    """Those of ``metrics.jsonl``."""
    total: int | None = None
    """Steps of the whole run, where its config says so."""
    age_s: float | None = None
    """Since the last line."""
    took_s: float | None = None
    """Since the first start."""
    committed: int | None = None
    """The last step that is committed."""
    phase: Phase | None = None
    health: Sequence[tuple[str, str]] = ()
    """Groups and engines, and how each is."""
    alarms: Sequence[RunAlarm] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    """Other facts, by name."""
    lanes: StepLanes | None = None
    """What every rank did in the last step that ended."""

    @property
    def step(self) -> int:
        """The last step with a line."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    def series(self, metric: str) -> list[float]:
        """All values of a metric."""
        return [float(line[metric]) for line in self.lines if line.get(metric) is not None]

    @property
    def left_s(self) -> float | None:
        """Seconds that are left at the pace of the last steps; None where that is not known."""
        said = self.series("seconds_left")[-1:]
        if said:
            return max(said[0] - (self.age_s or 0.0), 0.0)
        times = self.series("time/step")[-LAST_STEPS:]
        if self.total is None or not times:
            return None
        return max(median(times) * (self.total - self.step) - (self.age_s or 0.0), 0.0)

    def shares(self) -> dict[str, float]:
        """The share of each phase in the time of the last steps, the largest first."""
        lines = [line for line in self.lines if line.get("time/step")][-LAST_STEPS:]
        whole = sum(line["time/step"] for line in lines)
        seconds: dict[str, float] = {}
        for line in lines:
            for name, value in line.items():
                if name.startswith("time/") and name != "time/step" and value:
                    seconds[name.removeprefix("time/")] = seconds.get(name.removeprefix("time/"), 0.0) + value
        return (
            {name: value / whole for name, value in sorted(seconds.items(), key=lambda one: -one[1])} if whole else {}
        )


def live_view(state: RunState, pen: Pen, height: int | None = None) -> list[str]:
    """The lines of a picture of the run; lanes are in it where a terminal of ``height`` lines has room for them."""
    first = [_heading(state), *_progress(state, pen), *_alarms(state)]  # a low terminal cuts off what comes last
    lines = pen.lines(*first, _metrics(state, pen), *_times(state), *_health(state))
    if state.lanes is None:
        return lines
    room = len(state.lanes.lanes) + OTHER_LINES if height is None else height - len(lines)
    return [*lines, *pen.lines(*lanes_view(state.lanes, pen, room))]


def _heading(state: RunState) -> Text:
    style = {"running": "green", "finished": "cyan"}.get(state.state, "yellow")
    return Text.assemble(plain(state.name, "bold"), "  ", plain(state.kind), "  ", plain(state.state, style))


def _progress(state: RunState, pen: Pen) -> list[Text]:
    words = [f"step {state.step}" + (f" of {state.total}" if state.total else "")]
    if state.took_s is not None:
        words.append(f"{duration(state.took_s)} so far")
    if state.left_s is not None and state.state == "running":
        words.append(f"{duration(state.left_s)} left")
    if state.committed is not None:
        words.append(f"step {state.committed} is committed")
    shown = [Text(", ".join(words))]
    if state.total:
        shown.insert(0, pen.bar(state.step / state.total, min(pen.width, 60)))
    if state.phase is not None:
        phase = Text.assemble("now ", (state.phase.name, "bold"), f" for {duration(state.phase.seconds)}")
        if state.phase.usual_s is not None:
            phase.append(f", usually {duration(state.phase.usual_s)}", "dim")
        shown.append(phase)
    return shown


def _metrics(state: RunState, pen: Pen) -> Table:
    """The last value of each metric; with its unit and its curve where there is room for them."""
    room = pen.width - WITHOUT_CURVE
    grid = Table.grid(padding=(0, 1), pad_edge=False)
    grid.add_column(no_wrap=True, overflow="crop")
    grid.add_column(justify="right", no_wrap=True, min_width=VALUE_WIDTH)
    for style in (["dim"] if pen.width >= WITHOUT_CURVE else []) + (["cyan"] if room >= SHORTEST_CURVE else []):
        grid.add_column(no_wrap=True, style=style)
    for name in SHOWN:
        if values := state.series(name):
            cells = (Text(name), Text(short(values[-1]), "bold"), Text(REGISTRY[name].unit))
            curve = Text(pen.spark(values, min(room, LONGEST_CURVE)))
            grid.add_row(*(*cells, curve)[: len(grid.columns)])
    return grid


def _times(state: RunState) -> list[Text]:
    shares = [f"{name} {share:.0%}" for name, share in state.shares().items() if share >= 0.005]
    return [Text(f"time of the last steps: {', '.join(shares)}")] if shares else []


def _health(state: RunState) -> list[Text]:
    shown = [
        Text.assemble(plain(name, "bold"), " ", plain(how, "green" if how.startswith("healthy") else "yellow"))
        for name, how in state.health
    ]
    return [*shown, *(Text.assemble((f"{name}: ", "dim"), plain(value)) for name, value in state.facts.items())]


def _alarms(state: RunState) -> list[Text]:
    return [
        Text.assemble(
            (f"{one.severity} {one.name}", STYLES.get(one.severity, "")), plain(f": {one.meaning}. {one.way_out}")
        )
        for one in state.alarms
    ]


def log_lines(before: RunState | None, now: RunState) -> list[str]:
    """What is new since ``before``, for a log: the last step, changes of state and health, alarms that begin and end."""
    lines = []
    if before is None or before.state != now.state:
        lines.append(f"{now.name}: {now.state}")
    if now.lines and (before is None or before.step != now.step):
        lines.append(_step_line(now))
    known = dict(before.health) if before else {}
    lines += [
        f"{name}: {how}" for name, how in now.health if known.get(name, "healthy").split(",")[0] != how.split(",")[0]
    ]
    held = {one.name for one in before.alarms} if before else set()
    holds = {one.name for one in now.alarms}
    lines += [f"{one.severity} {one.name}: {one.meaning}. {one.way_out}" for one in now.alarms if one.name not in held]
    lines += [f"{name} has ended" for name in sorted(held - holds)]
    return [plain(line).plain.replace("\n", " ") for line in lines]


def _step_line(state: RunState) -> str:
    steps = f"{state.step}/{state.total}" if state.total else str(state.step)
    values = [f"{name} {values[-1]:.3g}" for name in IN_A_LINE if (values := state.series(name))]
    left = [] if state.left_s is None or state.state != "running" else [f"{duration(state.left_s)} left"]
    return "  ".join([steps, *values, *left])
