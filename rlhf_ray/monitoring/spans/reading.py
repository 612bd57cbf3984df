"""Read the files that the processes of a run record in, as they grow, and bring the clocks of several machines together.

Invariants: a line that is torn or no span is counted and left out. Processes of one start of a machine share a clock. That of
another machine is set by the clocks on the wall, and then moved, where these are wrong, so far that no call is answered before
it was sent, and none is known to be answered before it was.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_ray.monitoring.spans.records import DRIVER, Attempt, Life, Span
from rlhf_ray.processes.parts import older_part

Raw = dict[str, Any]
LONGEST_HEADER = 65_536
CLOCKS_DIFFER_US = 60_000_000
"""So much longer spans of other machines are kept: their clocks may be wrong."""


class ProcessFile:
    """The file of one process, and what was read of it: all, or of what it held at first the last ``last_bytes``."""

    def __init__(self, path: Path, last_bytes: int | None = None) -> None:
        self.path = path
        self.header: Raw = {}
        self.spans: dict[str, Raw] = {}
        """By their ids; those that have not ended have no ``end``."""
        self.damaged = 0
        self.whole_since: int | None = None
        """From when on it holds all that its process did, by the clock of that; None where it has lost nothing."""
        self._part, self._offset = b"", 0
        """What the part that was read last begins with, and how far it was read."""
        self._last_bytes = last_bytes
        self._first: int | None = None

    def read(self) -> None:
        """Take up what was written since."""
        with suppress(OSError), self.path.open("rb") as file:
            part = _first_line(file)
            if not part:
                return
            if part != self._part:
                is_first = not self._part
                if not is_first or self._last_bytes is None:
                    self._read_older()
                self._part, self._offset = part, 0
                if is_first and self._last_bytes is not None:
                    self._skip(file, self._last_bytes)
            self._read(file)

    def _skip(self, file: BinaryIO, last_bytes: int) -> None:
        """Read the header and no more than the last bytes; all of a file that is short, or has no span there."""
        size = file.seek(0, os.SEEK_END)
        if size <= last_bytes + LONGEST_HEADER:
            return
        self._take(self._part.rstrip(b"\n"))
        file.seek(size - last_bytes)
        file.readline()  # the rest of a line
        self._offset = file.tell()
        self._read(file)
        # The line of a wait may be late; each other one is written when its span begins or ends.
        first = next((raw for raw in self.spans.values() if raw["kind"] != "wait"), None)
        if first is None:
            self._offset = 0
        else:
            self.whole_since = first.get("end", first["begin"])

    def _read_older(self) -> None:
        """Take up the part before the present one: the rest of it, or all, where others came after what was read last."""
        with suppress(OSError), older_part(self.path).open("rb") as file:
            if _first_line(file) != self._part:
                self._lose()
                self._offset = 0
            self._read(file)
            return
        self._lose()

    def _lose(self) -> None:
        """A part was not read: what was under way may have ended in it; the next part repeats what is under way still."""
        self._first = self.first
        self.header, self.spans = {}, {key: raw for key, raw in self.spans.items() if "end" in raw}

    def _read(self, file: BinaryIO) -> None:
        file.seek(self._offset)
        whole, newline, _ = file.read().rpartition(b"\n")
        for line in whole.split(b"\n"):
            self._take(line)
        self._offset += len(whole) + len(newline)

    def _take(self, line: bytes) -> None:
        if not line:
            return
        try:
            content = json.loads(line)
            if "clock" in content:
                times = {name: int(content[name]) for name in ("clock", "wall", "born")}
                since = None if content.get("since") is None else int(content["since"])
                if not self.header:  # what follows what was read has lost nothing
                    self.whole_since = since
                self.header = times | {name: str(content[name]) for name in ("lane", "driver", "boot")}
            elif "begin" in content:
                self.spans.setdefault(str(content["id"]), _checked(content))  # a part repeats what was under way
            elif str(content["id"]) in self.spans:
                self.spans[str(content["id"])] |= {"end": int(content["end"]), "failed": bool(content.get("failed"))}
        except (ValueError, TypeError, KeyError, OverflowError, RecursionError):  # 1e999 overflows
            self.damaged += 1

    def forget(self, before: int) -> None:
        """Keep no span that had ended before ``before``, by the clock of the process."""
        self._first = self.first
        self.spans = {key: raw for key, raw in self.spans.items() if raw.get("end", before) >= before}

    @property
    def first(self) -> int | None:
        """When its process began what was read first, also of what is not kept; None where there is nothing."""
        kept = min((raw["begin"] for raw in self.spans.values()), default=self._first)
        return kept if self._first is None or kept is None else min(kept, self._first)

    @property
    def unix_offset(self) -> int:
        """What its clock is behind microseconds since 1970."""
        return int(self.header["wall"] - self.header["clock"])


def _checked(line: Raw) -> Raw:
    """A line that begins a span, with values of their types; what else stands in it is left out."""
    known: Raw = {name: int(line[name]) for name in ("begin", "end", "sent", "step") if line.get(name) is not None}
    known |= {name: str(line.get(name, "")) for name in ("kind", "name", "call", "thread")}
    known |= {"lane": str(line["lane"])} if "lane" in line else {}
    known |= {"calls": {str(call): str(name) for call, name in dict(line.get("calls", {})).items()}}
    return known | {"answered": [str(call) for call in line.get("answered", ())], "inline": bool(line.get("inline"))}


def _first_line(file: BinaryIO) -> bytes:
    """What tells a part from others; empty while it is being written."""
    line = file.readline(LONGEST_HEADER)
    return line if line.endswith(b"\n") else b""


def _driver_in(header: bytes) -> str:
    """The name of the driver in the first line of a file; empty where there is none."""
    try:
        return str(json.loads(header)["driver"])
    except (ValueError, TypeError, KeyError, RecursionError):
        return ""


class SpanFiles:
    """All files of a run; with ``driver``, the name of the file of a driver, those of its attempt alone.

    With ``last_bytes`` no more than these is read of what a file held at first: enough for the last steps.
    """

    def __init__(self, directory: Path, driver: str | None = None, *, last_bytes: int | None = None) -> None:
        self.directory = directory
        self._last_bytes = last_bytes
        self.driver = driver
        self.files: dict[str, ProcessFile] = {}
        self._others: set[str] = set()
        """Files of other attempts."""

    def read(self) -> SpanFiles:
        """Take up what was written since; returns itself."""
        with suppress(OSError):
            for path in sorted(self.directory.glob("*.jsonl")):
                if path.stem not in self.files and path.stem not in self._others:
                    self._add(path)
        for file in self.files.values():
            file.read()
        return self

    def forget(self, before: int, *, boot: str, unix_offset: int) -> None:
        """Keep no span that had ended before a moment by the clock of the machine of ``boot``, which is so far behind."""
        for file in self.files.values():
            if file.header:
                is_there = file.header["boot"] == boot
                file.forget(before + (0 if is_there else unix_offset - file.unix_offset - CLOCKS_DIFFER_US))

    def _add(self, path: Path) -> None:
        if self.driver is not None:
            with path.open("rb") as file:
                line = _first_line(file)
            if not line:
                return  # being written
            if _driver_in(line) != self.driver:
                self._others.add(path.stem)
                return
        self.files[path.stem] = ProcessFile(path, self._last_bytes)

    def attempts(self, *, until: int | None = None) -> list[Attempt]:
        """The attempts whose drivers have recorded, the first one first; ``until`` is now, where the last one is under way."""
        known = [(name, file) for name, file in self.files.items() if file.header]
        drivers = [(name, file) for name, file in known if file.header["lane"] == DRIVER]
        drivers.sort(key=lambda one: one[1].header["wall"])
        return [
            _attempt(name, driver, [file for _, file in known if file.header["driver"] == name], until)
            for name, driver in drivers
        ]


def _attempt(name: str, driver: ProcessFile, files: Sequence[ProcessFile], until: int | None) -> Attempt:
    last = max([driver.header["clock"], *(raw.get("end", raw["begin"]) for raw in driver.spans.values())])
    until = max(last, until or 0)
    own = sorted(_spans(driver, until), key=lambda span: (span.begin, -span.end))
    lives = [_inline(lane, own, driver) for lane in sorted({span.lane for span in own} - {DRIVER})]
    lives += [_life(file, driver, own, until) for file in files if file is not driver]
    since = [(file.whole_since, 0 if file is driver else shift_of(file, driver, own)) for file in files]
    return Attempt(
        name=name,
        began=min([driver.header["clock"], *(span.begin for span in own)]),
        until=until,
        unix_offset=driver.unix_offset,
        driver=own,
        lives=_cut_at_the_next(lives),
        damaged=sum(file.damaged for file in files),
        whole_since=max((at + shift for at, shift in since if at is not None), default=None),
    )


def _spans(file: ProcessFile, until: int, shift: int = 0) -> Iterable[Span]:
    for raw in file.spans.values():
        end = raw.get("end")
        begin = raw["begin"] + shift
        yield Span(
            lane=str(raw.get("lane", file.header["lane"])),
            name=raw["name"],
            kind=raw["kind"],
            begin=begin,
            end=max(until, begin) if end is None else end + shift,
            call=raw["call"],
            sent=raw.get("sent"),
            calls=raw["calls"],
            answered=raw["answered"],
            step=raw.get("step"),
            thread=raw["thread"],
            inline=raw["inline"],
            finished=end is not None,
            failed=bool(raw.get("failed")),
            process=file.path.stem,
        )


def _inline(lane: str, own: Sequence[Span], driver: ProcessFile) -> Life:
    """A lane of the driver's own process: a rank in it, or a reward source that records nothing itself."""
    spans = [span for span in own if span.lane == lane]
    return Life(lane, driver.header["clock"], spans, spans[0].begin, in_driver=True)


def _life(file: ProcessFile, driver: ProcessFile, own: Sequence[Span], until: int) -> Life:
    shift = shift_of(file, driver, own)
    spans = sorted(_spans(file, until, shift), key=lambda span: (span.begin, -span.end))
    born = file.header["born"] + shift
    started = until if file.first is None else file.first + shift
    return Life(file.header["lane"], min(born, started), spans, started)


def shift_of(file: ProcessFile, driver: ProcessFile, own: Sequence[Span]) -> int:
    """What to add to the times of a process to have them in the driver's clock."""
    if file.header["boot"] == driver.header["boot"]:
        return 0
    shift = file.unix_offset - driver.unix_offset
    seen = {call: span.end for span in own for call in span.answered}
    spans = list(file.spans.values())
    least: int | None = max(
        [raw["sent"] - raw["begin"] - shift for raw in spans if raw.get("sent") is not None], default=None
    )
    most: int | None = min(
        [seen[raw["call"]] - raw["end"] - shift for raw in spans if raw["call"] in seen and "end" in raw],
        default=None,
    )
    if least is not None and most is not None and least > most:  # clocks that drift apart
        return shift + (least + most) // 2
    return shift + max(0 if least is None else least, min(0 if most is None else most, 0))


def _cut_at_the_next(lives: Sequence[Life]) -> list[Life]:
    """What a process had not ended when the next one of its lane was born, it was killed in."""
    ordered, cut = sorted(lives, key=lambda life: life.born), []
    for number, life in enumerate(ordered):
        later = [other.born for other in ordered[number + 1 :] if other.lane == life.lane]
        if later:
            limit = later[0]
            spans = [
                span if span.finished else replace(span, end=max(min(span.end, limit), span.begin))
                for span in life.spans
            ]
            life = replace(life, spans=spans)
        cut.append(life)
    return cut
