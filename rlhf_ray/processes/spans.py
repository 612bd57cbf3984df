"""What the processes of a run do and when: spans, which each process writes to a file of its own as they begin and end.

Invariants: the line of what began or ended is in the file before the work goes on, so that a process that is killed loses
nothing that had ended, but for the last wait of each thread: a wait may go on, so its line is written when the thread does
something else, or when the process stops to record. A line that cannot be written stops nothing, and leaves no part of itself.
A process keeps the last two parts of its file. One that follows another says ``since`` when, and begins with all that was under
way then, so that of what ends later nothing is lost. A line holds names of roles, methods, phases and reward sources, times
and ids, and nothing that a user wrote or a model read. Where nothing records, every function here does nothing.

A span of a rank says which call it answers and when the driver sent that, since a call carries its :class:`Context`. Times are
microseconds of the monotonic clock of the process' machine; the first line of a file says what that clock and the clock on the
wall showed. ``monitoring/spans`` reads the files and brings the clocks of several machines together.
"""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_ray.console import get_logger
from rlhf_ray.processes.clock import boot, born_us, now_us
from rlhf_ray.processes.open_telemetry import render
from rlhf_ray.processes.parts import add_line

KEPT_BYTES = 256 * 2**20
"""When a process of a run starts to record, the oldest files go that make the directory larger than this."""
TOGETHER_US = 5_000
"""Waits of a thread that follow one another so soon are one wait: a loop that polls makes fifty a second."""
LONGEST_US, MOST_CALLS = 60_000_000, 64
"""What one wait lasts and names at most."""
CONTEXT = "_context"
"""The argument with which a method of an actor gets the context of its call."""

_ids = random.Random(int.from_bytes(os.urandom(8), "big"))
"""Its own, so that the seeds of a run draw the same with spans and without."""


class Context(NamedTuple):
    """What a call carries to the process that answers it."""

    directory: str
    """Where that process writes its file; the same path on every node."""
    open_telemetry: str
    """Where it writes the same spans for OpenTelemetry; empty where it does not."""
    driver: str
    """The process that sent it, by the name of its file."""
    role: str
    trace: str
    parent: str
    """The span in which the call was sent."""
    call: str
    sent: int | None
    """When, by the driver's clock; None where a rank sent it."""
    beside: bool
    """Whether it is answered beside other calls, in a lane of its own."""


class Sent(NamedTuple):
    """A call that was sent."""

    call: str
    name: str
    """Role and method."""
    context: Context


class _Wait:
    """What a thread waited for last, which goes on if it waits again at once."""

    def __init__(self, name: str, begin: int) -> None:
        self.name = name
        self.begin = self.end = begin
        self.thread = _thread()
        self.calls: dict[str, str] = {}
        self.answered: list[str] = []
        self.open = False
        """Whether the thread waits now."""

    def goes_on(self, name: str, now: int) -> bool:
        """Whether a wait of the same thread that begins now is this one still."""
        soon, long = now - self.end <= TOGETHER_US, now - self.begin > LONGEST_US or len(self.calls) >= MOST_CALLS
        return soon and not long and self.name == name and self.thread == _thread()


class Recorder:
    """Writes the file of one process, which has a ``lane`` of its own such as ``driver`` or ``policy/0``."""

    def __init__(self, directory: str | Path, lane: str, *, open_telemetry: str | Path = "", driver: str = "") -> None:
        self.name = f"{lane.replace('/', '-')}.{time.time_ns() // 1_000_000}.{os.getpid()}"
        self.directory, self.lane = Path(directory), lane
        self.path = self.directory / f"{self.name}.jsonl"
        self.open_telemetry = Path(open_telemetry) / f"{self.name}.jsonl" if str(open_telemetry) else None
        self.driver = driver or self.name
        self.trace = new_id(32)
        self.lost = 0
        """Lines that could not be written."""
        self.starting = ""
        """The span of everything before the first step, while it lasts."""
        self._open: dict[str, dict[str, Any]] = {}
        """What is under way; a part that follows begins with it."""
        self._lock = threading.RLock()
        self._waits: dict[int, _Wait] = {}
        """The last wait of each thread, by its number."""
        now, wall = now_us(), time.time_ns() // 1000
        self._wall_offset = wall - now
        self._header = {
            "lane": lane,
            "driver": self.driver,
            "host": socket.gethostname(),
            "boot": boot(),
            "pid": os.getpid(),
            "clock": now,
            "wall": wall,
            "born": born_us(now),
        }

    def begin(self, name: str, kind: str, *, trace: str = "", **about: Any) -> str:
        """Write that a span begins; returns its id."""
        self._end_wait()
        span = {"id": new_id(), "name": name, "kind": kind, "begin": now_us(), **_thread(), **about}
        with self._lock:
            self._write(self.path, span, self._head)
            self._open[span["id"]] = span | {"trace": trace or self.trace}
        return str(span["id"])

    def end(self, span: str, *, failed: bool = False) -> None:
        """Write that it has ended."""
        self._end_wait()
        end = {"id": span, "end": now_us()} | ({"failed": True} if failed else {})
        with self._lock:
            self._write(self.path, end, self._head)
            begun = self._open.pop(span)
        self._tell(begun | end)

    def add(self, name: str, kind: str, begin: int, end: int, **about: Any) -> None:
        """Write a span that has begun and ended."""
        wait = self._waits.get(threading.get_ident())
        if wait is not None and not wait.open:
            self._end_wait()
        self._add({"name": name, "kind": kind, "begin": begin, "end": end, **_thread(), **about})

    def _add(self, about: Mapping[str, Any]) -> None:
        span = {"id": new_id(), **about}
        self._write(self.path, span, self._head)
        self._tell(span | {"trace": self.trace})

    @contextmanager
    def span(self, name: str, kind: str, **about: Any) -> Iterator[None]:
        """The ``with`` block as a span; calls that are sent in it have it as their parent."""
        above = _current.get(None)
        parent = about.pop("parent", None) or ("" if above is None or above[0] is not self else above[1])
        identity = self.begin(name, kind, **({"parent": parent} if parent else {}), **about)
        token = _current.set((self, identity))
        failed = True
        try:
            yield
            failed = False
        finally:
            _current.reset(token)
            self.end(identity, failed=failed)

    @contextmanager
    def waiting(self, calls: Sequence[Sent], name: str = "", *, for_all: bool = False) -> Iterator[None]:
        """Around a wait of this thread for any of ``calls``, or for what ``name`` says.

        A wait ``for_all`` that returns has seen the answers.
        """
        now, wait = now_us(), self._waits.get(threading.get_ident())
        if wait is None or not wait.goes_on(name, now):
            self._end_wait()
            wait = self._waits[threading.get_ident()] = _Wait(name, now)
        wait.calls |= {call.call: call.name for call in calls}
        wait.open = True
        try:
            yield
            if for_all:
                wait.answered += [call.call for call in calls]
        finally:
            wait.end, wait.open = now_us(), False

    def _end_wait(self, thread: int | None = None) -> None:
        """Write the last wait of a thread, by default of this one."""
        wait = self._waits.pop(threading.get_ident() if thread is None else thread, None)
        if wait is None:
            return
        known = {"calls": wait.calls, "answered": wait.answered} if wait.calls else {}
        name = wait.name or ", ".join(sorted(set(wait.calls.values())))
        self._add({"name": name, "kind": "wait", "begin": wait.begin, "end": wait.end, **wait.thread, **known})

    def started(self) -> None:
        """The first step begins now."""
        if self.starting:
            span, self.starting = self.starting, ""
            self.end(span)

    def close(self) -> None:
        """Write what each thread waited for last, and say how much was lost."""
        for thread, wait in list(self._waits.items()):
            if not wait.open:
                self._end_wait(thread)
        if self.lost:
            get_logger("spans").warning("%d lines of %s could not be written", self.lost, self.path)

    def _tell(self, span: Mapping[str, Any]) -> None:
        if self.open_telemetry is not None:
            about = {
                "rlhf_ray.lane": span.get("lane", self.lane),
                "host.name": self._header["host"],
                "process.pid": os.getpid(),
            }
            self._write(self.open_telemetry, render(span, self._wall_offset, about), lambda _: b"")

    def _head(self, goes_on: bool) -> bytes:
        """What a part of the file begins with."""
        header = self._header | ({"since": now_us()} if goes_on else {})
        return b"".join(map(_line, (header, *self._open.values())))

    def _write(self, path: Path, line: Mapping[str, Any], head: Callable[[bool], bytes]) -> None:
        try:
            with self._lock:
                add_line(path, _line(line), head)
        except OSError as error:
            if not self.lost:
                get_logger("spans").warning("%s cannot be written (%s): the run goes on without it", path, error)
            self.lost += 1


_current: ContextVar[tuple[Recorder, str] | None] = ContextVar("span", default=None)
"""The recorder and the span that this thread is in."""
_of_process: list[Recorder] = []
"""The recorder of this process, if it is a driver that records; the last one counts."""
_of_ranks: dict[tuple[str, str], Recorder] = {}
"""In the process of a rank, by directory and lane."""
_one_for_each_lane = threading.Lock()


@contextmanager
def recording(directory: Path, open_telemetry: Path | None = None) -> Iterator[None]:
    """Record what this process, the driver, and those that it calls do in the ``with`` block."""
    if not _made(directory, open_telemetry):
        yield
        return
    recorder = Recorder(
        directory.resolve(), "driver", open_telemetry="" if open_telemetry is None else open_telemetry.resolve()
    )
    _of_process.append(recorder)
    try:
        with recorder.span("run", "run"):
            recorder.starting = recorder.begin("start", "phase")
            try:
                yield
            finally:
                recorder.started()
    finally:
        _of_process.remove(recorder)
        recorder.close()


def _made(*directories: Path | None) -> bool:
    """Whether there is room in all of them, once the oldest files are gone."""
    for directory in filter(None, directories):
        try:
            directory.mkdir(exist_ok=True)
            _remove_oldest(directory)
        except OSError as error:
            get_logger("spans").warning("%s cannot be written (%s): the run goes on without it", directory, error)
            return False
    return True


def recorder() -> Recorder | None:
    """Where this thread records; None where nothing does."""
    current = _current.get(None)
    if current is not None:
        return current[0]
    return _of_process[-1] if _of_process else None


@contextmanager
def span(name: str, kind: str = "phase", **about: Any) -> Iterator[None]:
    """The ``with`` block as a span of this process."""
    here = recorder()
    if here is None:
        yield
        return
    with here.span(name, kind, **about):
        yield


@contextmanager
def waiting(*calls: Sent | None, name: str = "", for_all: bool = False) -> Iterator[None]:
    """Around a wait of this thread for calls, or for what ``name`` says; for those that were not recorded nothing happens."""
    here, sent = recorder(), [call for call in calls if call is not None]
    if here is None or not (sent or name):
        yield
        return
    with here.waiting(sent, name, for_all=for_all):
        yield


def sending(role: str, method: str, *, beside: bool = False) -> Sent | None:
    """A call that this process sends now; None where nothing records."""
    here, current = recorder(), _current.get(None)
    if here is None:
        return None
    call = new_id()
    where = "" if here.open_telemetry is None else str(here.open_telemetry.parent)
    parent = "" if current is None else current[1]
    sent = now_us() if here.name == here.driver else None
    context = Context(str(here.directory), where, here.driver, role, here.trace, parent, call, sent, beside)
    return Sent(call, f"{role}.{method}", context)


def carried(sent: Sent | None) -> dict[str, Context]:
    """The argument of an actor's method that has its answer recorded; none where nothing records."""
    return {} if sent is None else {CONTEXT: sent.context}


@contextmanager
def answering(context: Context, rank: int, method: str) -> Iterator[None]:
    """The ``with`` block as what a rank does for a call; in the driver's own process too, where ranks may live."""
    lane = f"{context.role}/{rank}"
    here, more = recorder(), dict[str, Any]()
    if here is None or here.lane != "driver":
        with _one_for_each_lane:
            here = _of_ranks.get((context.directory, lane))
            if here is None:
                here = Recorder(context.directory, lane, open_telemetry=context.open_telemetry, driver=context.driver)
                _of_ranks[context.directory, lane] = here
    else:
        more |= {"lane": lane, "inline": True}
    kind = "beside" if context.beside else "call"
    more |= {} if context.sent is None else {"sent": context.sent}
    with here.span(method, kind, call=context.call, parent=context.parent, trace=context.trace, **more):
        yield


def answered_elsewhere(sent: Sent | None) -> None:
    """Write that a call was answered by what records nothing itself, such as a service; from when it was sent until now."""
    here = recorder()
    if here is not None and sent is not None and sent.context.sent is not None:
        role, parent, call, begin = sent.context.role, sent.context.parent, sent.call, sent.context.sent
        method = sent.name.rpartition(".")[2]
        here.add(method, "call", begin, now_us(), lane=f"{role}/0", call=call, sent=begin, parent=parent)


def started() -> None:
    """What was recorded so far is the start of the run; the first step begins now."""
    here = recorder()
    if here is not None:
        here.started()


def end_step(step: int, begin_s: float, end_s: float) -> None:
    """Write a step that took from ``begin_s`` to ``end_s`` of ``time.monotonic``.

    What follows belongs to another trace of OpenTelemetry: that of a whole run would be too long to look at.
    """
    here = recorder()
    if here is not None:
        here.add("step", "step", round(begin_s * 1e6), round(end_s * 1e6), step=step)
        here.trace = new_id(32)


def new_id(digits: int = 16) -> str:
    """A random id of so many hexadecimal digits."""
    return f"{_ids.getrandbits(4 * digits):0{digits}x}"


def _line(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, separators=(",", ":")).encode() + b"\n"


def _thread() -> dict[str, str]:
    """The name of the thread, where it is not the main one of a driver; Ray runs the calls of a rank in others."""
    thread = threading.current_thread()
    return {} if thread is threading.main_thread() else {"thread": thread.name}


def _remove_oldest(directory: Path) -> None:
    files = sorted(directory.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
    size = 0
    for file in files:
        size += file.stat().st_size
        if size > KEPT_BYTES:
            file.unlink(missing_ok=True)
