"""The lanes of the last step are those that a reader of everything would show, from the last part of the files alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.monitoring.spans import latest, reading
from rlhf_ray.monitoring.spans.latest import LatestStep
from rlhf_ray.monitoring.spans.reading import SpanFiles
from rlhf_ray.monitoring.spans.steps import OTHER_WORK, StepLanes, numbered, step_pieces

from .simulated import durations, program, run

RANKS = {"policy": 2, "rollout": 1}
Lines = dict[str, list[dict[str, Any]]]


def steps(seed: int, count: int, driver: str = "driver.1000.1") -> list[Lines]:
    """The lines of each step, by file: the first ones with the headers."""
    draw, at, found = random.Random(seed), 2_000_000, []
    for number in range(1, count + 1):
        plan = program(draw, RANKS)
        ran = run(plan, RANKS, durations(draw, plan, RANKS))
        lines: Lines = {
            driver: [],
            **{f"{lane.replace('/', '-')}.1001.{place}": [] for place, lane in enumerate(ran.lives)},
        }
        for name, spans in zip(lines, (ran.driver, *ran.lives.values()), strict=True):
            lane = "driver" if name == driver else name.split(".")[0].replace("-", "/")
            if number == 1:
                times = {"boot": "one", "clock": 1000, "wall": 5000, "born": 900}
                lines[name].append({"lane": lane, "driver": driver, **times})
            for place, span in enumerate(spans):
                about = {"id": f"{number}.{lane}.{place}", "name": span.name, "kind": span.kind}
                about |= {"begin": at + span.begin, "end": at + span.end}
                about |= {"call": f"{number}.{span.call}", "sent": at + span.sent} if span.sent is not None else {}
                about |= (
                    {"calls": {f"{number}.{call}": name for call, name in span.calls.items()}} if span.calls else {}
                )
                lines[name].append(about)
        lines[driver].append(
            {"id": f"s{number}", "name": "step", "kind": "step", "begin": at, "end": at + ran.end, "step": number}
        )
        at += ran.end
        found.append(lines)
    return found


def write(directory: Path, lines: Lines) -> None:
    for name, own in lines.items():
        with (directory / f"{name}.jsonl").open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in own)


def of_everything(directory: Path) -> StepLanes:
    attempt = SpanFiles(directory).read().attempts()[-1]
    return StepLanes(attempt.steps()[-1], step_pieces(attempt, attempt.steps()[-1]))


@pytest.mark.parametrize("seed", range(5))
def test_after_each_step_its_lanes_are_shown_and_little_is_kept(seed: int, tmp_path: Path) -> None:
    reader, most = LatestStep(tmp_path), 0
    assert reader.read() is None
    for number, lines in enumerate(steps(seed, 12), 1):
        write(tmp_path, lines)
        shown = reader.read()
        assert shown == of_everything(tmp_path) and shown.step.number == number
        assert reader.read() is shown, "what is known is not made again"
        assert reader._files is not None
        most = max(most, sum(len(file.spans) for file in reader._files.files.values()))
    per_step = max(sum(map(len, lines.values())) for lines in steps(seed, 12))
    assert most <= 2 * per_step


@pytest.mark.parametrize("kept", [500, 2000, 20_000])
def test_of_long_files_the_end_is_read_and_a_step_that_is_cut_is_not_shown(
    kept: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(latest, "LAST_BYTES", kept)
    monkeypatch.setattr(reading, "LONGEST_HEADER", 200)
    *before, last, next_one = steps(1, 22)
    for lines in [*before, last]:
        write(tmp_path, lines)
    whole = max(sum(len(json.dumps(line)) + 1 for line in own) for own in last.values()) < kept
    reader = LatestStep(tmp_path)
    shown = reader.read()
    assert (shown == of_everything(tmp_path)) if whole else (shown is None)
    assert reader._files is not None
    size = max(path.stat().st_size for path in tmp_path.iterdir())
    assert size > kept
    for file in reader._files.files.values():
        assert (file.whole_since is not None) is (file.path.stat().st_size > kept + 200)
    write(tmp_path, next_one)
    assert reader.read() == of_everything(tmp_path), "what is written from then on is all read"


def test_a_new_attempt_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    first, second = steps(1, 1), steps(2, 2, "driver.2000.9")
    for own in second:
        for name in [name for name in own if name != "driver.2000.9"]:
            own[name.replace(".1001.", ".2001.")] = own.pop(name)
    write(tmp_path, first[0])
    reader = LatestStep(tmp_path)
    shown = reader.read()
    assert shown is not None and shown.step.number == 1
    write(tmp_path, {"driver.2000.9": second[0]["driver.2000.9"][:2]})
    assert reader.read() is None, "of an attempt that begins nothing is known"
    second[0]["driver.2000.9"] = second[0]["driver.2000.9"][2:]
    for lines in second:
        write(tmp_path, lines)
    shown = reader.read()
    assert shown is not None and shown.step.number == 2
    assert shown.lanes == of_everything(tmp_path).lanes


def test_works_are_numbered_from_the_longest_and_the_rest_share_the_last_number(tmp_path: Path) -> None:
    for lines in steps(4, 3):
        write(tmp_path, lines)
    lanes = of_everything(tmp_path).lanes
    all_of_them = numbered([lanes], 99)
    assert list(all_of_them.values()) == list(range(len(all_of_them))) and len(all_of_them) == 3
    assert numbered([lanes], 2) == {next(iter(all_of_them)): 0, OTHER_WORK: 1}
