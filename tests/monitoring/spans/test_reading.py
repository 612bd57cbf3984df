"""The files of processes are read as they grow, and clocks that disagree never have a call answered before it was sent."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.monitoring.spans.reading import SpanFiles
from rlhf_ray.processes import spans


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


@pytest.mark.parametrize("seed", range(10))
def test_what_is_read_while_a_file_grows_and_turns_over_is_all_of_it(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is read in between, no span is lost or doubled by a reader that looks often enough."""
    monkeypatch.setattr(spans, "PART_BYTES", 2000)
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
