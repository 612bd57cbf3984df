"""The heartbeat and the record of alarms hold what the driver wrote, and nothing that others put there is taken for it."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from pathlib import Path

import pytest

from rlhf_ray.errors import IntegrityError
from rlhf_ray.runs.alarms.heartbeat import ENDED, Heartbeat, HeartbeatFile
from rlhf_ray.runs.alarms.record import AlarmChange, AlarmRecord, history
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.reporting import status


def test_a_heartbeat_is_read_as_it_was_written_and_nothing_else_is(tmp_path: Path) -> None:
    file = HeartbeatFile(tmp_path / "heartbeat.json")
    assert file.read() is None
    beat = Heartbeat(5.0, "update", 4.0, None, {"age/step": 1.5}, {"groups/lost": [(4.0, 1.0)]})
    file.write(beat)
    assert file.read() == beat
    begins = '{"at": 1, "phase": "", "phase_began": 1, "phase_usual_s": null, '
    for other in (
        "", "[]", "{}", '{"at": 1}', "[" * 9999, begins.replace('"at": 1', '"at": NaN') + '"values": {}, "events": {}}',
        begins + '"values": [], "events": {}}', begins + '"values": {"a": "b"}, "events": {}}',
        begins + '"values": {}, "events": {"a": [[1]]}}',
    ):  # fmt: skip
        file.path.write_text(other)
        assert file.read() is None, other
    file.path.write_text(begins + '"values": {}, "events": {}}')
    assert file.read() == Heartbeat(1.0, "", 1.0)


def test_where_a_file_system_has_no_locks_the_heartbeat_says_whether_a_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = RunDirectory.create(tmp_path / "run", "kind: ppo\n")
    made.release()
    now = time.time()

    def beat(at: float, started: float, phase: str = "update") -> bool:
        made.heartbeat.write(Heartbeat(at, phase, at, None, {"run/started": started}, {}))
        return RunDirectory(made.path).is_owned()

    assert not beat(now, now - 9.0), "a lock that is free says that nobody owns it"

    def refuse(descriptor: int, *_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    assert RunDirectory(made.path).is_owned(), (
        "one that has just begun has no heartbeat that is not of an earlier attempt"
    )
    made.heartbeat.path.unlink()
    assert RunDirectory(made.path).is_owned(), "or none at all"
    made.attempts.amend_last({"timestamp": now - 590.0})
    assert RunDirectory(made.path).is_owned(), "while it reads large inputs"
    made.attempts.amend_last({"timestamp": now - 610.0})
    assert not RunDirectory(made.path).is_owned(), "but not for ever"
    assert beat(now, now - 9.0) and status(RunDirectory(made.path))["state"] == "running"
    assert not beat(now - 61.0, now - 90.0) and status(RunDirectory(made.path))["state"].startswith(
        "stopped; go on with"
    )
    assert not beat(now + 61.0, now - 90.0), "a clock that is so far ahead says nothing"
    assert not beat(now, -now), "it has ended in order"
    assert not beat(now, now - 9.0, ENDED), "or with an error"
    made.attempts.amend_last({"timestamp": now + 1.0})
    assert beat(now, now - 9.0, ENDED), "until the next attempt begins"


def change(at: float, name: str, *, began: bool) -> AlarmChange:
    return AlarmChange(at, int(at), name, "warning", began, "so")


def test_a_record_is_read_as_it_was_written_and_a_damaged_line_is_named(tmp_path: Path) -> None:
    record = AlarmRecord(tmp_path / "alarms.jsonl")
    changes = [change(1.0, "A", began=True), change(2.0, "A", began=False)]
    for one in changes:
        record.add(one)
    assert record.read() == changes
    good = json.loads(record.path.read_text().splitlines()[0])
    for wrong in ({"severity": "grave"}, {"began": 1}, {"at": -1}, {"step": 1.5}, {"alarm": None}):
        record.path.write_text(json.dumps(good | wrong) + "\n")
        with pytest.raises(IntegrityError, match=rf"alarms\.jsonl:1 is damaged \({next(iter(wrong))}"):
            record.read()


def test_an_alarm_lasts_until_its_end_or_that_of_its_attempt() -> None:
    changes = [
        change(10.0, "A", began=True),
        change(12.0, "B", began=True),
        change(15.0, "A", began=False),
        change(16.0, "C", began=False),  # of which the begin could not be written
        change(30.0, "A", began=True),
        change(31.0, "A", began=True),
    ]
    past = history(changes, starts=[0.0, 20.0], last_sign=None)
    assert [(one.alarm, one.began, one.ended) for one in past] == [
        ("A", 10.0, 15.0),
        ("B", 12.0, 20.0),
        ("A", 30.0, None),
    ]
    assert history(changes, starts=[0.0, 20.0], last_sign=40.0)[-1].ended == 40.0
    assert history(changes, starts=[0.0, 20.0], last_sign=25.0)[-1].ended == 30.0, "no alarm ends before it begins"
