"""Spans as a trace file that Perfetto (https://ui.perfetto.dev) and Chrome's ``about:tracing`` open.

Invariants: each lane is a process of the trace, with one thread for its calls, one for what it waited for, and one for each
thread that works beside these; events of a thread nest. Times are microseconds since the first attempt began.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rlhf_ray.monitoring.spans.critical_path import critical_path
from rlhf_ray.monitoring.spans.lanes import WORK, driver_pieces, lane_pieces
from rlhf_ray.monitoring.spans.records import DRIVER, Attempt, Span, Step

Event = dict[str, Any]
CRITICAL = "critical path"
MAIN, WAITS = 0, 1


def trace(attempts: Sequence[Attempt], first: int = 0, last: int | None = None) -> dict[str, Any]:
    """The trace of the steps from ``first`` to ``last``; without both, of everything."""
    events: list[Event] = []
    threads: dict[tuple[str, str], int] = {}
    lanes: dict[str, int] = {CRITICAL: 0, DRIVER: 1}
    origin = attempts[0].began + attempts[0].unix_offset if attempts else 0
    for attempt in attempts:
        steps = [step for step in attempt.steps() if first <= step.number and (last is None or step.number <= last)]
        if first == 0 and last is None:
            begin, end = attempt.began, attempt.until
        elif steps:
            begin, end = steps[0].begin, steps[-1].end
        else:
            continue
        shift = attempt.unix_offset - origin
        for event in _events(attempt, begin, end, steps, lanes, threads):
            events.append(event | {"ts": event["ts"] + shift})
    return {"traceEvents": [*_names(lanes, threads), *events], "displayTimeUnit": "ms"}


def _events(
    attempt: Attempt,
    begin: int,
    end: int,
    steps: Iterable[Step],
    lanes: dict[str, int],
    threads: dict[tuple[str, str], int],
) -> Iterator[Event]:
    def thread(lane: str, name: str) -> int:
        if name in ("", "wait"):
            return WAITS if name else MAIN
        return threads.setdefault((lane, name), 2 + sum(1 for known, _ in threads if known == lane))

    def event(lane: str, track: int, name: str, left: int, right: int, **about: Any) -> Event:
        process = lanes.setdefault(lane, len(lanes))
        entry = {"name": name, "ph": "X", "ts": left, "dur": right - left, "pid": process, "tid": track}
        return entry | ({"args": about} if about else {})

    def within(spans: Iterable[Span]) -> Iterator[Span]:
        return (span for span in spans if span.begin < end and span.end > begin)

    for span in within(attempt.driver):
        if span.lane == DRIVER:
            yield event(DRIVER, thread(DRIVER, span.thread), span.name, span.begin, span.end, **_about(span))
    driver = driver_pieces(attempt.driver, begin, end)
    for lane, lives in attempt.lanes().items():
        for span in within(span for life in lives for span in life.spans):
            beside = span.name if span.kind == "beside" else ""
            yield event(lane, thread(lane, beside), span.name, span.begin, span.end, **_about(span))
            if span.sent is not None and span.kind == "call" and not span.inline:
                arrow = {"name": "call", "cat": "call", "id": span.call + lane}
                yield arrow | {"ph": "s", "ts": span.sent, "pid": lanes[DRIVER], "tid": MAIN}
                yield arrow | {"ph": "f", "bp": "e", "ts": span.begin, "pid": lanes[lane], "tid": MAIN}
        for piece in lane_pieces(lives, driver, begin, end):
            if piece.kind != WORK:
                yield event(lane, thread(lane, "wait"), piece.name, piece.begin, piece.end)
    for step in steps:
        for part in critical_path(attempt, step.begin, step.end):
            yield event(CRITICAL, MAIN, part.label, part.begin, part.end, process=part.lane, step=step.number)


def _about(span: Span) -> dict[str, Any]:
    about: dict[str, Any] = {} if span.step is None else {"step": span.step}
    if not span.finished:
        about["unfinished"] = True
    if span.failed:
        about["failed"] = True
    return about


def _names(lanes: dict[str, int], threads: dict[tuple[str, str], int]) -> Iterator[Event]:
    for lane, process in lanes.items():
        yield {"name": "process_name", "ph": "M", "pid": process, "args": {"name": lane}}
        yield {"name": "process_sort_index", "ph": "M", "pid": process, "args": {"sort_index": process}}
        yield {"name": "thread_name", "ph": "M", "pid": process, "tid": MAIN, "args": {"name": "works"}}
        if lane not in (DRIVER, CRITICAL):
            yield {"name": "thread_name", "ph": "M", "pid": process, "tid": WAITS, "args": {"name": "waits for"}}
    for (lane, name), number in threads.items():
        yield {"name": "thread_name", "ph": "M", "pid": lanes[lane], "tid": number, "args": {"name": name}}
