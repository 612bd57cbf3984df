"""An incident is on disk when it was added, and is read back as it was; a damaged line is named."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from rlhf_ray.errors import IntegrityError
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.incidents import Incident, Incidents

ONE = Incident(
    at=1.8e9, step=7, phase="accumulate", role="critic", rank=1, fault="died", cause="its process died",
    action="rolled_back", back_to=5, lost_steps=2, seconds=11.5,
)  # fmt: skip


def test_incidents_are_read_back_in_their_order_with_the_first_line_of_each_cause(tmp_path: Path) -> None:
    incidents = Incidents(tmp_path / "incidents.jsonl")
    assert incidents.read() == []
    other = replace(ONE, role="driver", rank=None, fault="numeric", action="skipped")
    incidents.add(replace(ONE, cause="\n its process died\nTraceback"))
    incidents.add(other)
    assert Incidents(incidents.path).read() == [replace(ONE, cause="its process died"), other]


def test_a_torn_last_line_is_ignored(tmp_path: Path) -> None:
    incidents = Incidents(tmp_path / "incidents.jsonl")
    incidents.add(ONE)
    with incidents.path.open("a") as stream:
        stream.write('{"at": 1.8e9, "step"')
    assert incidents.read() == [ONE]
    incidents.add(ONE)
    assert incidents.read() == [ONE, ONE]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"step": -1}, "step is -1, not a whole number"),
        ({"back_to": 1.5}, "back_to is 1.5, not a whole number"),
        ({"lost_steps": None}, "lost_steps is None, not a whole number"),
        ({"seconds": "long"}, "seconds is 'long', not a number from 0 on"),
        ({"at": -5}, "at is -5, not a number from 0 on"),
        ({"role": 1}, "role is 1, not a text"),
        ({"rank": "first"}, "rank is 'first', not a whole number or null"),
        ({"fault": "bored"}, "fault is 'bored', not one of died, deadline"),
        ({"action": "cried"}, "action is 'cried', not one of restarted, rolled_back"),
    ],
)
def test_a_line_that_is_no_incident_is_named(change: dict[str, object], problem: str, tmp_path: Path) -> None:
    path = tmp_path / "incidents.jsonl"
    path.write_text(json.dumps(asdict(ONE)) + "\n" + json.dumps(asdict(ONE) | change) + "\n")
    with pytest.raises(IntegrityError, match=rf"incidents.jsonl:2 is damaged \({problem}"):
        Incidents(path).read()


def test_incidents_stay_where_a_run_goes_back_and_go_where_it_is_discarded(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", "kind: sft\n")
    run.incidents.add(ONE)
    run.go_on(None)
    assert run.incidents.read() == [ONE], "time that was lost stays lost"
    run.discard()
    assert not (tmp_path / "run").exists()
