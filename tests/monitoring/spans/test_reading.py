"""The files of processes are read as they grow, and clocks that disagree never have a call answered before it was sent."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.monitoring.spans import reading
from rlhf_ray.monitoring.spans.reading import ProcessFile, SpanFiles
from rlhf_ray.processes import parts, spans
from rlhf_ray.processes.parts import older_part


def write(directory: Path, name: str, *lines: dict[str, Any]) -> None:
    with (directory / f"{name}.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def header(lane: str, driver: str = "driver", **other: Any) -> dict[str, Any]:
    return {"lane": lane, "driver": driver, "boot": "one", "clock": 1000, "wall": 5000, "born": 900} | other


def test_a_span_is_whole_once_its_end_is_read_and_goes_on_until_then(tmp_path: Path) -> None:
    write(tmp_path, "driver", header("driver"), {"id": "a", "name": "update", "kind": "phase", "begin": 1100})
    files = SpanFiles(tmp_path)
    (attempt,) = files.read().attempts(until=1500)
    (span,) = attempt.driver
    assert (span.begin, span.end, span.finished) == (1100, 1500, False)
    write(tmp_path, "driver", {"id": "a", "end": 1300, "failed": True})
    (span,) = files.read().attempts(until=1500)[0].driver
    assert (span.end, span.finished, span.failed) == (1300, True, True)


def test_torn_and_foreign_lines_are_counted_and_left_out(tmp_path: Path) -> None:
    write(
        tmp_path, "driver", header("driver"), {"id": "a", "name": "update", "kind": "phase", "begin": 1100, "end": 1200}
    )
    with (tmp_path / "driver.jsonl").open("a") as file:
        file.write(
            '{"id": "b", "na{"id": "c"}\n[1]\n{"id": "d", "name": 1, "kind": "x", "begin": "soon"}\n{"id": "e", "begi'
        )
    (attempt,) = SpanFiles(tmp_path).read().attempts()
    assert [span.name for span in attempt.driver] == ["update"] and attempt.damaged == 3


@pytest.mark.parametrize(
    "line",
    [
        '{"id": "b", "name": "x", "kind": "phase", "begin": 1e999}',
        '{"id": "b", "name": "x", "kind": "phase", "begin": 1, "end": -1e999}',
        '{"id": "a", "end": 1e999}',
        '{"lane": "driver", "driver": "driver", "boot": "one", "clock": 1e999, "wall": 1, "born": 1}',
    ],
)
def test_a_time_that_no_clock_shows_is_a_damaged_line(line: str, tmp_path: Path) -> None:
    write(tmp_path, "driver", header("driver"), {"id": "a", "name": "update", "kind": "phase", "begin": 1100})
    with (tmp_path / "driver.jsonl").open("a") as file:
        file.write(line + "\n")
    file = ProcessFile(tmp_path / "driver.jsonl")
    file.read()
    assert file.damaged == 1 and file.spans.keys() == {"a"} and "end" not in file.spans["a"]
    assert file.header["clock"] == 1000


@pytest.mark.parametrize("seed", range(10))
def test_what_is_read_while_a_file_grows_and_turns_over_is_all_of_it(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is read in between, no span is lost or doubled by a reader that looks often enough."""
    monkeypatch.setattr(parts, "PART_BYTES", 2000)
    draw = random.Random(seed)
    recorder = spans.Recorder(tmp_path, "driver")
    files, names = SpanFiles(tmp_path), []
    for number in range(60):
        names.append(f"phase {number}")
        with recorder.span(names[-1], "phase"):
            if draw.random() < 0.3:
                files.read()
        if number % 6 == 0:
            files.read()
    (attempt,) = files.read().attempts()
    assert [span.name for span in attempt.driver] == names and all(span.finished for span in attempt.driver)
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 2 * 2000 + 1000  # and the disk holds two parts


def of_another_machine(wrong_us: int, drift: float = 0.0) -> list[list[dict[str, Any]]]:
    """A driver and a rank whose clock began elsewhere, whose clock on the wall is wrong, and perhaps drifts."""
    driver, rank = [header("driver")], [header("policy/0", boot="two", clock=70_000, wall=5000 + wrong_us, born=70_000)]
    for number in range(20):
        sent = 2000 + 1000 * number
        begin, end = sent + 100, sent + 600
        seen = end + 50
        shown = [round(70_000 + (time - 1000) * (1 + drift)) for time in (begin, end)]
        answer = {"call": f"c{number}", "sent": sent, "begin": shown[0], "end": shown[1]}
        rank.append({"id": f"r{number}", "name": "apply", "kind": "call"} | answer)
        wait = {"calls": {f"c{number}": "policy.apply"}, "answered": [f"c{number}"], "begin": sent + 10, "end": seen}
        driver.append({"id": f"w{number}", "name": "policy.apply", "kind": "wait"} | wait)
    return [driver, rank]


@pytest.mark.parametrize("wrong_us", [0, 40, -90, 5_000_000, -5_000_000])
def test_a_clock_that_is_wrong_is_moved_until_calls_are_answered_after_they_were_sent(
    wrong_us: int, tmp_path: Path
) -> None:
    driver, rank = of_another_machine(wrong_us)
    write(tmp_path, "driver", *driver)
    write(tmp_path, "rank", *rank)
    (attempt,) = SpanFiles(tmp_path).read().attempts()
    (life,) = attempt.lives
    seen = {call: span.end for span in attempt.driver for call in span.answered}
    for number, span in enumerate(life.spans):
        assert span.sent is not None and span.sent <= span.begin and span.end <= seen[span.call]
        assert abs(span.begin - (2100 + 1000 * number)) <= 100  # no further off than calls and answers take
    if abs(wrong_us) <= 40:  # what is possible is left as the clocks say
        assert life.spans[0].begin == 2100 + wrong_us


def test_a_clock_that_drifts_is_off_by_no_more_than_its_drift(tmp_path: Path) -> None:
    driver, rank = of_another_machine(0, drift=0.02)
    write(tmp_path, "driver", *driver)
    write(tmp_path, "rank", *rank)
    (life,) = SpanFiles(tmp_path).read().attempts()[0].lives
    assert max(abs(span.begin - (2100 + 1000 * number)) for number, span in enumerate(life.spans)) <= 300


def test_a_process_that_was_killed_is_cut_off_where_the_next_one_is_born(tmp_path: Path) -> None:
    write(tmp_path, "driver", header("driver"), {"id": "s", "name": "run", "kind": "run", "begin": 1000, "end": 9000})
    open_call = {"id": "x", "name": "generate", "kind": "call", "begin": 2000, "call": "c", "sent": 1900}
    write(tmp_path, "engine", header("rollout/0", born=1200), open_call)
    write(tmp_path, "engine-again", header("rollout/0", born=4000), open_call | {"id": "y", "begin": 5000, "end": 6000})
    (attempt,) = SpanFiles(tmp_path).read().attempts()
    first, second = attempt.lanes()["rollout/0"]
    assert (first.spans[0].end, first.spans[0].finished) == (4000, False)
    assert (second.born, second.started, second.spans[0].end) == (4000, 5000, 6000)


def test_each_attempt_has_its_own_processes_and_steps(tmp_path: Path) -> None:
    for number in (1, 2):
        driver = header("driver", f"driver{number}", wall=5000 * number)
        write(
            tmp_path,
            f"driver{number}",
            driver,
            {"id": "s", "name": "step", "kind": "step", "begin": 1, "end": 9, "step": number},
        )
        write(tmp_path, f"rank{number}", header("policy/0", f"driver{number}"))
    first, second = SpanFiles(tmp_path).read().attempts()
    assert [step.number for step in first.steps()] == [1] and [step.number for step in second.steps()] == [2]
    assert len(first.lives) == len(second.lives) == 1


def test_the_parts_of_many_steps_are_what_lies_in_each(tmp_path: Path) -> None:
    lines = [header("driver"), {"id": "r", "name": "run", "kind": "run", "begin": 0, "end": 400}]
    for number in range(4):
        begin = 100 * number
        lines.append(
            {"id": f"s{number}", "name": "step", "kind": "step", "begin": begin, "end": begin + 100, "step": number}
        )
        lines.append(
            {"id": f"p{number}", "name": f"p{number}", "kind": "phase", "begin": begin + 10, "end": begin + 100}
        )
    write(tmp_path, "driver", *lines)
    (attempt,) = SpanFiles(tmp_path).read().attempts()
    for step, cut in attempt.by_step():
        assert {span.name for span in cut.driver} == {"run", "step", f"p{step.number}"}


def test_a_directory_without_spans_has_no_attempt(tmp_path: Path) -> None:
    assert SpanFiles(tmp_path / "nowhere").read().attempts() == []


def test_of_one_attempt_the_files_of_others_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        driver = f"driver{number}"
        write(tmp_path, driver, header("driver", driver, wall=5000 * number))
        write(tmp_path, f"rank{number}", header("policy/0", driver))
    (tmp_path / "begun.jsonl").write_text('{"lane": "policy/1", "driv')
    (tmp_path / "foreign.jsonl").write_text("[]\n")
    opened, read = [], ProcessFile.read
    monkeypatch.setattr(ProcessFile, "read", lambda file: (opened.append(file.path.stem), read(file)))
    files = SpanFiles(tmp_path, "driver2")
    (attempt,) = files.read().attempts()
    assert attempt.name == "driver2" and [life.lane for life in attempt.lives] == ["policy/0"]
    (tmp_path / "begun.jsonl").write_text("")
    write(tmp_path, "begun", header("policy/1", "driver2"))
    (attempt,) = files.read().attempts()
    assert [life.lane for life in attempt.lives] == ["policy/0", "policy/1"], "what was being written is read later"
    assert set(opened) == {"driver2", "rank2", "begun"}


class Recorded:
    """Spans that a recorder writes in random order, and what is true of them; each reading of its clock is a microsecond."""

    def __init__(self, directory: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock = itertools.count(10**6)
        monkeypatch.setattr(parts, "PART_BYTES", 2000)
        monkeypatch.setattr(spans, "now_us", lambda: next(self.clock))
        self.recorder, self.draw = spans.Recorder(directory, "driver"), random.Random(seed)
        self.true: dict[str, list[int | None]] = {}
        """The end of each span by its id; None while it is under way."""

    def go_on(self) -> None:
        under_way = [key for key, (end,) in self.true.items() if end is None]
        if under_way and (len(under_way) > 4 or self.draw.random() < 0.5):
            key = self.draw.choice(under_way)
            self.true[key] = [next(self.clock) + 1]
            self.recorder.end(key)
        else:
            self.true[self.recorder.begin("work", "phase")] = [None]

    def check(self, file: ProcessFile) -> int | None:
        """That a file holds all that it says it does; returns since when."""
        file.read()
        since = file.whole_since or 0
        known = {key: [raw.get("end")] for key, raw in file.spans.items()}
        wanted = {key: end for key, end in self.true.items() if end[0] is None or end[0] >= since}
        assert {key: known.get(key) for key in wanted} == wanted and not file.damaged
        assert len(known) <= len(wanted) + 1, "and it does not say less than it could"  # one ended as the part began
        return file.whole_since


@pytest.mark.parametrize("seed", range(5))
def test_from_the_moment_that_a_file_says_on_nothing_is_lost(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded, said = Recorded(tmp_path, seed, monkeypatch), []
    path = recorded.recorder.path
    for number in range(300):
        recorded.go_on()
        if number % 10 == 9:
            said.append(recorded.check(ProcessFile(path)))
    assert said[0] is None, "nothing was lost at first"
    told = [since for since in said if since is not None]
    assert len(set(told)) > 5 and told == sorted(told) and said[-len(told) :] == told
    older_part(path).unlink()  # as where the oldest files of a run go
    since = recorded.check(ProcessFile(path))
    assert since is not None and since > told[-1]


def test_a_reader_that_slept_through_parts_knows_since_when_it_has_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorded = Recorded(tmp_path, 0, monkeypatch)
    file = ProcessFile(recorded.recorder.path)
    for _ in range(200):
        recorded.go_on()
        file.read()
    assert recorded.check(file) is None, "one that looks often has lost nothing"
    for _ in range(300):
        recorded.go_on()
    before, first = set(recorded.true) - set(file.spans), file.first
    file.read()
    assert file.whole_since is not None and file.whole_since == recorded.check(ProcessFile(recorded.recorder.path))
    assert not file.damaged and before - set(file.spans), "else the test shows nothing"
    under_way = {key for key, (end,) in recorded.true.items() if end is None}
    assert {key for key, raw in file.spans.items() if "end" not in raw} == under_way, (
        "what ended in a lost part has ended"
    )
    assert file.first == first, "and the process began when it did"


def test_of_a_long_file_the_end_is_whole_from_a_line_that_was_written_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a wait is written when its thread does something else, perhaps long after others have begun and ended."""
    monkeypatch.setattr(reading, "LONGEST_HEADER", 200)
    lost = [{"id": f"l{n}", "name": "lost", "kind": "phase", "begin": 2000 + n, "end": 2000 + n} for n in range(100)]
    wait = {"id": "w", "name": "nothing", "kind": "wait", "begin": 1500, "end": 1600}
    call = {"id": "c", "name": "update", "kind": "call", "begin": 3000, "end": 3100}
    write(tmp_path, "driver", header("driver"), *lost, wait, call)
    file = ProcessFile(tmp_path / "driver.jsonl", len(json.dumps(wait) + json.dumps(call)) + 10)
    file.read()
    assert file.spans.keys() == {"w", "c"} and file.whole_since == 3100
    no_other = ProcessFile(tmp_path / "driver.jsonl", len(json.dumps(call)))
    no_other.read()
    assert len(no_other.spans) == 102 and no_other.whole_since is None, "where no span is in the end, all is read"


def test_an_attempt_is_whole_since_the_last_of_its_files_is_by_the_clock_of_the_driver(tmp_path: Path) -> None:
    write(tmp_path, "driver", header("driver", since=1500))
    write(tmp_path, "rank", header("policy/0", boot="two", clock=70_000, since=71_000))
    write(tmp_path, "other", header("policy/1"))
    assert SpanFiles(tmp_path).read().attempts()[0].whole_since == 2000
    write(tmp_path, "late", header("policy/2", since=3000))
    assert SpanFiles(tmp_path).read().attempts()[0].whole_since == 3000
