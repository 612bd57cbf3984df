"""The matrix of faults: its cells, how verdicts are read and kept, and a fixed sample of cells in this process."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.incidents import Incident
from tests.faults import matrix, matrix_cells, matrix_verdicts
from tests.faults.matrix_cells import CALLS, FAULTS, PHASES, ROLES, SIGNALS, Cell, cells, digest, where, why_not
from tests.faults.matrix_driver import Hit, Plan, faults, read_events
from tests.faults.matrix_verdicts import IN_PLACE, PARENT, WITH_DRIVER, Verdict, read_hit
from tests.faults.verdict import ledger_differences, weight_differences
from tests.trainers.small_runs import config_of, signals_as_before, train

pytestmark = pytest.mark.early


def test_every_combination_is_a_cell_or_has_a_reason_why_it_is_none() -> None:
    every = [Cell(role, phase, fault) for role in ROLES for phase in PHASES for fault in FAULTS]
    there = set(cells())
    assert {cell for cell in every if why_not(cell) is None} == there and len(there) == 174
    for cell in every:  # a signal meets a process that has no work too; a call that is not made cannot fail
        works = cell.role == "driver" or cell.role in CALLS[cell.phase]
        assert (cell in there) == (works or cell.fault in SIGNALS), cell
    assert all(where(cell) == "Ray" for cell in there if cell.role == "driver" or cell.fault in (*SIGNALS, "hang"))


def test_a_cell_is_stale_once_a_file_that_it_runs_has_changed_and_not_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(matrix_cells, "PACKAGE", tmp_path)
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "shards.py").write_text("a = 1\n")
    saves, scores = Cell("policy", "checkpoint", "hang"), Cell("reward", "scoring", "hang")
    before = digest(saves), digest(scores)
    (tmp_path / "engine" / "shards.py").write_text("a = 2\n")
    matrix_cells._digest.cache_clear()
    try:
        assert digest(saves) != before[0] and digest(scores) == before[1]
        open_ones = matrix_verdicts.open_cells([verdict(saves, digest=before[0]), verdict(scores, digest=before[1])])
    finally:
        matrix_cells._digest.cache_clear()
    assert saves in open_ones and scores not in open_ones and len(open_ones) == 173


def test_every_place_of_the_digests_is_there() -> None:
    places = [matrix_cells.EVERYWHERE, *matrix_cells.OF_ROLE.values(), *matrix_cells.OF_PHASE.values()]
    missing = {place for some in places for place in some if not (matrix_cells.PACKAGE / place).exists()}
    assert missing == set(), "a room that was renamed would never make a verdict stale"


def verdict(cell: Cell, **changes: Any) -> Verdict:
    return dataclasses.replace(
        Verdict(
            cell.role, cell.phase, cell.fault, IN_PLACE, True, True, 3.0, 1.0, 2.0, 1, 2.5, [], "Ray", "abc", 0, "-", "-", "-"
        ),
        **changes,
    )  # fmt: skip


def events(*lines: tuple[float, str, dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"at": at, "what": what, "pid": 1, **more} for at, what, more in lines]


BEFORE = [
    (0.0, "driver", {}), (1.0, "phase", {"name": "rollout", "step": 1}), (2.0, "step", {"step": 1}),
    (3.0, "phase", {"name": "rollout", "step": 2}), (4.0, "step", {"step": 2}),
    (5.0, "phase", {"name": "update", "step": 3}), (6.0, "hit", {"cell": "policy/update/hang"}),
]  # fmt: skip
REDONE = [
    (16.0, "phase", {"name": "rollout", "step": 2}), (17.0, "step", {"step": 2}), (18.0, "step", {"step": 3}),
    (30.0, "driver", {}),
]  # fmt: skip


def test_a_hit_is_read_with_what_it_cost() -> None:
    noticed = Incident(14.0, 2, "accumulate", "policy", 0, "stalled", "it hung", "restarted", 1, 1, 2.0)
    early = dataclasses.replace(noticed, at=1.0, seconds=99.0)
    reading = read_hit(events(*BEFORE, *REDONE), "policy/update/hang", [early, noticed])
    assert reading == matrix_verdicts.Reading(IN_PLACE, 12.0, 8.0, 2.0, 1, 8.0), (
        "what came after its step is not its affair"
    )
    of_driver = dataclasses.replace(noticed, role="driver", rank=None, seconds=1.0)
    silent = read_hit(events(*BEFORE, *REDONE), "policy/update/hang", [early, of_driver])
    assert silent is not None and silent.silence_s == 10.0, "that the driver was silent is no sign of it"
    unnoticed = read_hit(events(*BEFORE, *REDONE), "policy/update/hang", [early])
    assert unnoticed is not None and (unnoticed.detected_s, unnoticed.silence_s) == (None, 10.0)
    restarted = read_hit(events(*BEFORE, (10.0, "driver", {}), *REDONE), "policy/update/hang")
    assert restarted is not None and restarted.outcome == PARENT and restarted.detected_s is None
    killed = (7.0, "hit", {"cell": "driver/log_probs/SIGKILL"})
    also = read_hit(events(*BEFORE, killed, (10.0, "driver", {}), *REDONE), "policy/update/hang")
    assert also is not None and also.outcome == WITH_DRIVER, "it was the driver's own fault that ended it"
    of_itself = read_hit(events(*BEFORE, killed, (10.0, "driver", {}), *REDONE), "driver/log_probs/SIGKILL")
    assert of_itself is not None and of_itself.outcome == PARENT
    twice = read_hit(events(*BEFORE, (6.5, "driver", {}), killed, (10.0, "driver", {}), *REDONE), "policy/update/hang")
    assert twice is not None and twice.outcome == PARENT
    ended = read_hit(events(*BEFORE), "policy/update/hang")
    assert ended is not None and (ended.outcome, ended.seconds) == ("ended", None)
    assert read_hit(events(*BEFORE), "critic/update/hang") is None


def test_what_was_missed_in_the_next_step_only_is_read_to_the_end_of_that_step() -> None:
    late = [(7.0, "step", {"step": 3}), (8.0, "phase", {"name": "update", "step": 4}), (20.0, "step", {"step": 4})]
    noticed = Incident(9.0, 3, "accumulate", "policy", 0, "died", "it died", "restarted", 3, 0, 5.0)
    seen = events(*BEFORE, *late, (21.0, "step", {"step": 5}))
    overcome, nothing = (read_hit(seen, "policy/update/hang", incidents) for incidents in ([noticed], []))
    assert overcome is not None and (overcome.seconds, overcome.detected_s, overcome.silence_s) == (14.0, 3.0, 6.0)
    assert nothing is not None and (nothing.seconds, nothing.detected_s) == (1.0, None)
    another = events(*BEFORE, *late, (8.5, "hit", {"cell": "critic/log_probs/hang"}))
    first, second = (read_hit(another, cell, [noticed]) for cell in ("policy/update/hang", "critic/log_probs/hang"))
    assert first is not None and (first.seconds, first.detected_s) == (1.0, None), (
        "what the next one cost is not its affair"
    )
    assert second is not None and (second.seconds, second.detected_s) == (11.5, 0.5)


def test_what_is_met_after_the_last_step_is_overcome_once_the_run_has_ended() -> None:
    last = [
        (0.0, "driver", {}), (1.0, "phase", {"name": "rollout", "step": 2}), (2.0, "step", {"step": 2}),
        (3.0, "phase", {"name": "evaluation", "step": 2}), (4.0, "hit", {"cell": "rollout/evaluation/SIGSTOP"}),
    ]  # fmt: skip
    cut, whole, again = (
        read_hit(events(*last, *rest), "rollout/evaluation/SIGSTOP")
        for rest in ([], [(9.0, "end", {})], [(6.0, "driver", {}), (9.0, "end", {})])
    )
    assert cut is not None and (cut.outcome, cut.seconds) == ("ended", None)
    assert whole is not None and (whole.outcome, whole.seconds, whole.lost_steps) == (IN_PLACE, 5.0, 0)
    assert again is not None and (again.outcome, again.silence_s) == (PARENT, 3.0)


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, True), ({"identical": False}, False), ({"prompts_once": False}, False), ({"left": ["a process"]}, False),
        ({"outcome": PARENT}, False), ({"outcome": PARENT, "role": "driver"}, True), ({"outcome": WITH_DRIVER}, True),
        ({"outcome": "ended", "seconds": None}, False), ({"silence_s": 121.0}, False),
    ],
)  # fmt: skip
def test_a_verdict_says_whether_the_promise_was_kept(changes: dict[str, Any], kept: bool) -> None:
    assert verdict(Cell("critic", "update", "hang"), **changes).as_promised == kept


def test_the_table_shows_the_newest_verdict_and_what_has_none(tmp_path: Path) -> None:
    cell, page, results = Cell("critic", "update", "hang"), tmp_path / "page.md", tmp_path / "faults.jsonl"
    page.write_text(f"before\n{matrix_verdicts.BEGIN}\nold\n{matrix_verdicts.END}\nafter\n")
    drawn = [verdict(cell, drawn=True, run="a"), verdict(cell, drawn=True, run="b", identical=False)]
    matrix_verdicts.append([verdict(cell, identical=False), verdict(cell, seconds=7.25), *drawn], results)
    matrix_verdicts.write_table(matrix_verdicts.read(results), page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert (
        "1 of 174 cells have been run, 1 of them ended as promised. Of 2 runs that met several drawn kills, 1 did."
        in text
    )
    assert text.count("in place, 7 s, 1") == 1 and "other bits" not in text
    assert text.count("not run") == 173 and text.count(" - |") == 6 * 8 * 5 - 174


def test_the_cells_of_a_run_share_a_place_and_at_most_one_start_of_each_role() -> None:
    runs = matrix.share_out(cells())
    assert sorted(map(str, cells())) == sorted(str(cell) for one in runs for cell in one)
    for one in runs:
        assert len(one) <= matrix.PER_RUN and len({where(cell) for cell in one}) == 1
        started = [cell.role for cell in one if cell.phase == "start"]
        assert len(set(started)) == len(started)
        steps = [hit.step for hit in matrix.plan(one) if hit.step]
        assert len(set(steps)) == len(steps) and max(steps, default=0) < matrix.STEPS
        assert all((hit.step == 0) == (hit.cell.phase == "start") for hit in matrix.plan(one))


def test_the_committed_verdicts_can_be_read_and_are_those_of_the_page() -> None:
    known = matrix_verdicts.read()
    assert {verdict.cell for verdict in known} <= set(cells())
    assert matrix_verdicts.table(known) in matrix_verdicts.PAGE.read_text()
    assert all(json.loads(line)["commit"] for line in matrix_verdicts.RESULTS.read_text().splitlines())


SAMPLE = [
    Hit(Cell("rollout", "start", "slowness"), 0),
    Hit(Cell("rollout", "rollout", "exception"), 2),
    Hit(Cell("policy", "weights", "slowness"), 2),
    Hit(Cell("policy", "log_probs", "exception"), 3),
    Hit(Cell("policy", "update", "exception"), 4),
]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    def run(name: str, hits: list[Hit]) -> tuple[RunDirectory, list[dict[str, Any]]]:
        root = tmp_path_factory.mktemp(name)
        plan = Plan(hits, str(root / "events.jsonl"), 0)
        with faults(plan):
            kept = train(config_of("ppo", root, "steps=4", "rollout.max_restarts=100", "checkpoint.every_steps=1"))
        return kept, read_events(plan.events)

    with signals_as_before():
        yield run


def test_a_run_in_one_process_goes_on_from_errors_and_slow_calls_with_the_same_bits(run_of: Any) -> None:
    whole, nothing = run_of("whole", [])
    disturbed, seen = run_of("disturbed", SAMPLE)
    assert not [event for event in nothing if event["what"] == "hit"]
    for hit in SAMPLE:
        reading = read_hit(seen, str(hit.cell))
        assert reading is not None, f"{hit.cell} was not met"
        assert (reading.outcome, reading.lost_steps) == (IN_PLACE, 0), hit.cell
    assert weight_differences(disturbed.path, whole.path) == [] and ledger_differences(disturbed.path, whole.path) == []
