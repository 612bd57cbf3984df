"""Why a step was slow: lanes of all ranks, the critical path, and what each role waited for.

Invariants: the bars of a lane fill its width. All is plain text and widths in per cent, which the template escapes and a phone
shows as a desktop does; nothing needs a pointer or a script.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

from rlhf_ray.monitoring.report.charts import COLOURS, number
from rlhf_ray.monitoring.spans.critical_path import by_label, critical_path, slower_than
from rlhf_ray.monitoring.spans.lanes import WORK, Piece, idle_shares
from rlhf_ray.monitoring.spans.records import Attempt, Step, role_of
from rlhf_ray.monitoring.spans.steps import numbered, step_pieces, work_name

SHOWN_LANES = 64
SHORTEST = 0.002
"""Shorter parts of a step are drawn as what lies beside them."""
SHOWN_REASONS = 3
SHOWN_PARTS = 8
CUT = "Some files hold less than one step: what their processes did before looks like a start or a wait."


@dataclass(frozen=True)
class Bar:
    """A part of a lane: its width in per cent, its style and what it is."""

    width: float
    style: str
    text: str


@dataclass(frozen=True)
class Lane:
    """One process in a step."""

    name: str
    bars: Sequence[Bar]
    note: str
    """How long it worked, and what it waited for most."""


@dataclass(frozen=True)
class PathRow:
    """A part of the critical path, beside the same in the usual step."""

    label: str
    seconds: float
    share: float
    usual: float
    more: float


@dataclass(frozen=True)
class ShownStep:
    """The lanes of one step."""

    title: str
    lanes: Sequence[Lane]
    left_out: int


@dataclass(frozen=True)
class TimeByRank:
    """What the report shows of the spans of a run."""

    answer: str
    """Why the slowest step was slow, in a sentence."""
    path: Sequence[PathRow]
    steps: Sequence[ShownStep]
    legend: Sequence[tuple[str, str]]
    idle: Sequence[tuple[str, float, str]]
    """Role, its idle share over all recorded steps, and what it waited for most."""
    note: str = ""


def time_by_rank(attempts: Sequence[Attempt]) -> TimeByRank | None:
    """The slowest step that is recorded beside the usual one, by the last attempt that ended any; None where none did.

    Of the steps of that attempt those count of which nothing is lost, as long as there are any.
    """
    last = next((attempt for attempt in reversed(attempts) if attempt.steps()), None)
    if last is None:
        return None
    every = [(cut, step) for step, cut in last.by_step()]
    whole = [(cut, step) for cut, step in every if cut.whole_since is None or step.begin >= cut.whole_since]
    measured = whole or every
    by_time = sorted(measured, key=lambda one: one[1].seconds)
    slow = by_time[-1]
    usual = next(one for one in by_time if one[1].seconds == median_low(step.seconds for _, step in by_time))
    shown = [slow] if usual == slow else [slow, usual]
    pieces = [step_pieces(attempt, step) for attempt, step in shown]
    colours = numbered(pieces, COLOURS)
    path, usual_path = (by_label(critical_path(one, step.begin, step.end)) for one, step in (slow, usual))
    return TimeByRank(
        answer=_answer(slow[1], usual[1], path, usual_path),
        path=_rows(path, usual_path, slow[1].seconds),
        steps=[
            _shown(step, lanes, colours, "slowest" if number == 0 else "usual")
            for number, ((_, step), lanes) in enumerate(zip(shown, pieces, strict=True))
        ],
        legend=[*((name, f"b{colour}") for name, colour in colours.items()), ("waits", "idle")],
        idle=_idle(measured),
        note=" ".join(filter(None, (_damage(attempts), "" if whole else CUT))),
    )


def _shown(step: Step, lanes: Mapping[str, Sequence[Piece]], colours: Mapping[str, int], which: str) -> ShownStep:
    rows = [_lane(name, pieces, colours, step) for name, pieces in list(lanes.items())[:SHOWN_LANES]]
    title = f"Step {step.number}, the {which} one: {number(step.seconds, 3)} s"
    return ShownStep(title, rows, max(len(lanes) - SHOWN_LANES, 0))


def _lane(name: str, pieces: Sequence[Piece], colours: Mapping[str, int], step: Step) -> Lane:
    whole = max(step.end - step.begin, 1)
    bars: list[Bar] = []
    for piece in pieces:
        width = piece.length / whole
        colour = colours.get(work_name(name, piece), COLOURS - 1)
        style = f"b{colour}" if piece.kind == WORK else "idle"
        text = piece.name if piece.kind == WORK else f"waits for {piece.name}"
        if bars and (width < SHORTEST or (bars[-1].style, bars[-1].text) == (style, text)):
            bars[-1] = Bar(bars[-1].width + 100 * width, bars[-1].style, bars[-1].text)
        else:
            bars.append(Bar(100 * width, style, text))
    work = sum(piece.length for piece in pieces if piece.kind == WORK) / 1e6
    reasons = _reasons((piece for piece in pieces if piece.kind != WORK), lambda seconds: f"{number(seconds, 3)} s")
    return Lane(name, bars, f"works {number(work, 3)} s" + (f"; waits: {reasons}" if reasons else ""))


def _reasons(pieces: Iterable[Piece], show: Callable[[float], str]) -> str:
    seconds: dict[str, float] = {}
    for piece in pieces:
        seconds[piece.name] = seconds.get(piece.name, 0.0) + piece.length / 1e6
    longest = sorted(seconds.items(), key=lambda one: -one[1])[:SHOWN_REASONS]
    return ", ".join(f"{name} {show(length)}" for name, length in longest)


def _rows(path: Mapping[str, float], usual: Mapping[str, float], whole: float) -> list[PathRow]:
    labels = sorted({**path, **usual}, key=lambda label: -path.get(label, 0.0))[:SHOWN_PARTS]
    return [
        PathRow(
            label,
            path.get(label, 0.0),
            path.get(label, 0.0) / whole if whole else 0.0,
            usual.get(label, 0.0),
            path.get(label, 0.0) - usual.get(label, 0.0),
        )
        for label in labels
    ]


def _answer(slow: Step, usual: Step, path: Mapping[str, float], usual_path: Mapping[str, float]) -> str:
    text = f"The slowest recorded step, {slow.number}, took {number(slow.seconds, 3)} s"
    if not path:  # it took no time, and so none did
        return f"{text}."
    longest, seconds = max(path.items(), key=lambda one: one[1])
    share = f"{seconds / slow.seconds:.0%}" if slow.seconds else "all"
    if slow == usual:
        return f"{text}. {share} of its critical path is {longest}."
    label, more = slower_than(path, usual_path)[0]
    return (
        f"{text}, the usual one, {usual.number}, {number(usual.seconds, 3)} s. What made it longer is above all {label}, by "
        f"{number(more, 3)} s; {share} of its critical path is {longest}."
    )


def _idle(measured: Sequence[tuple[Attempt, Step]]) -> list[tuple[str, float, str]]:
    whole: dict[str, float] = {}
    share: dict[str, float] = {}
    waits: dict[str, list[Piece]] = {}
    for attempt, step in measured:
        for role, idle in idle_shares(attempt, step.begin, step.end).items():
            whole[role] = whole.get(role, 0.0) + step.seconds
            share[role] = share.get(role, 0.0) + idle * step.seconds
        for lane, pieces in step_pieces(attempt, step).items():
            waits.setdefault(role_of(lane), []).extend(piece for piece in pieces if piece.kind != WORK)
    rows = []
    for role in sorted(whole, key=lambda role: -share[role] / (whole[role] or 1.0)):
        own = waits.get(role, [])
        waited = sum(piece.length for piece in own) / 1e6

        def part(seconds: float, waited: float = waited) -> str:
            return f"{seconds / waited:.0%}" if waited else "0 %"

        rows.append((role, share[role] / whole[role] if whole[role] else 0.0, _reasons(own, part)))
    return rows


def _damage(attempts: Sequence[Attempt]) -> str:
    damaged = sum(attempt.damaged for attempt in attempts)
    return f"{damaged} damaged lines of the spans were left out." if damaged else ""
