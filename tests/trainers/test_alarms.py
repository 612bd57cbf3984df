"""Each fault raises its alarm and no other, in what ``status`` reads, and the way out that it names helps."""

from __future__ import annotations

import io
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.actors.groups import Group
from rlhf_ray.cli.main import main
from rlhf_ray.monitoring import events
from rlhf_ray.monitoring.phases import PhaseClock
from rlhf_ray.monitoring.registry import REGISTRY, STATE
from rlhf_ray.processes import progress
from rlhf_ray.rewards.client import RewardClient
from rlhf_ray.rewards.sample import TextSample
from rlhf_ray.rewards.source import ModelSource, score_or_hold
from rlhf_ray.rollout.health import FleetHealth, HealthPolicy
from rlhf_ray.runs.alarms.heartbeat import Heartbeat
from rlhf_ray.runs.alarms.record import AlarmChange
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.reporting import _alarm_table, alarms, write_report
from rlhf_ray.trainers import alarm_watch
from rlhf_ray.trainers.alarm_watch import AlarmWatch
from rlhf_ray.trainers.ppo.build import watch_engines
from rlhf_ray.trainers.ppo.rewards import RemoteScorer
from tests.trainers.small_runs import config_of, signals_as_before, train

FLOOR_S = 600.0
"""Nothing here takes half of it, however busy the machine is."""
STALL_FLOOR_S = 2.0
OVERDUE = {"PhaseOverdue", "StepOverdue", "CommitOverdue"}
JUDGE = """
import pathlib, time
here = pathlib.Path(__file__)

def steps():
    metrics = pathlib.Path(METRICS)
    return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0

def lengths(responses):
    while steps() >= 2 and not here.with_name("continued").exists():
        time.sleep(0.05)
    if steps() >= 4 and not here.with_name("back").exists():
        raise ConnectionError("the judge is away")
    return [float(len(response)) for response in responses]
"""
"""Hangs after the second step until it is continued, and is away after the fourth until it is back."""


def names(run: RunDirectory, now: float | None = None) -> set[str]:
    return {one.alarm.name for one in alarms(run, now)}


class Watched:
    """A run without training that a watch looks at whenever it is told to."""

    def __init__(self, path: Path, *overrides: str) -> None:
        self.run = RunDirectory.create(path / "run", "kind: ppo\n")
        self.clock = PhaseClock()
        self.told: list[dict[str, float]] = []
        config = config_of("ppo", path, f"run.stall_floor_s={FLOOR_S}", *overrides)
        self.watch = AlarmWatch(self.run, config, self.clock, (self,))
        self.alarms = self.watch  # what build() is given as the journal
        self.watch.start()
        assert self.run.heartbeat.is_fresh(time.time()), "before anybody asks"
        self.watch.log(1, {"time/step": 0.1, "step": 1.0})

    def log(self, step: int, values: dict[str, float]) -> None:
        self.told.append(values)

    def again(self) -> None:
        """Nothing: the test of the exporter is elsewhere."""

    def later(self, seconds: float) -> None:
        """Have the step and the phases that are under way have begun so much earlier."""
        self.clock._open = tuple((name, began - seconds) for name, began in self.clock._open)
        assert self.watch._last_step_at is not None
        self.watch._last_step_at -= seconds

    def look(self) -> set[str]:
        """What status says after a look; the watch itself says the same."""
        self.watch.look()
        assert set(self.watch.holding) == names(self.run)
        return names(self.run)


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    watched = Watched(tmp_path)
    yield watched
    watched.watch.stop(in_order=True)
    watched.run.release()


def test_an_engine_that_died_and_came_back_before_anybody_looked_is_told(watched: Watched) -> None:
    health = FleetHealth(2, HealthPolicy())
    watch_engines(health, watched.run, watched)  # type: ignore[arg-type]
    for engine in health.publish(1):
        health.updated(engine, 1, 0)
    assert watched.look() == set()
    health.died(1, "killed", 0)
    health.started(1, health.restart(1))
    health.publish(1)
    health.updated(1, 1, 1)
    assert health.healthy == (0, 1)
    assert watched.look() == {"EngineLost"}
    assert {"rollout/engine_deaths": 1.0} in watched.told
    assert names(watched.run, time.time() + 599) >= {"EngineLost"}
    assert "EngineLost" not in names(watched.run, time.time() + 601)


def test_an_engine_that_stays_down_is_told_for_as_long(watched: Watched) -> None:
    health = FleetHealth(2, HealthPolicy(max_restarts=0))
    watch_engines(health, watched.run, watched)  # type: ignore[arg-type]
    health.died(1, "killed", 0)
    assert watched.look() == {"EngineLost"}
    assert "EngineLost" in names(watched.run, time.time() + 3000)


def test_a_gateway_that_is_dead_is_told_by_the_calls_that_fail(watched: Watched) -> None:
    with RewardClient("http://127.0.0.1:9", hold_s=0.0) as client:
        source = ModelSource(RemoteScorer(client), policy=None)
        (result,) = score_or_hold(source, [TextSample(0, 0, "a", "b", None, True, (1, 2))], hold_s=0.0)
    assert result.error is not None
    assert watched.look() == {"RewardFailing"}


def test_a_phase_in_which_a_rank_is_slow_is_told_before_the_watchdog_ends_anything(watched: Watched) -> None:
    for _ in range(3):
        with watched.clock.phase("update"):
            pass
    with watched.clock.phase("update"):
        assert watched.look() == set()
        watched.later(FLOOR_S / 2)
        assert watched.look() == {"PhaseOverdue"}, "which explains that the step is overdue too"
        beat = watched.run.heartbeat.read()
        assert beat is not None and beat.phase == "update"
        watched.later(FLOOR_S)
        assert watched.look() == {"PhaseOverdue"}
    assert watched.look() == {"StepOverdue"}
    watched.watch.log(2, {"time/step": 2.0, "step": 2.0})
    assert watched.look() == set()


def test_a_full_disk_is_told_until_there_is_room(small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(200_000)
    watched = Watched(disk)
    assert watched.look() == set()
    usage = os.statvfs(disk)
    (disk / "others").write_bytes(bytes(usage.f_bavail * usage.f_frsize))
    watched.watch.look()
    assert names(watched.run) == {"DiskFull"} == set(watched.watch.holding)
    assert names(watched.run, time.time() + 3600) == {"DiskFull"}, "which explains that no heartbeat can be written"
    (disk / "others").unlink()
    assert watched.look() == set()
    watched.watch.stop(in_order=True)
    watched.run.release()


def test_a_driver_that_is_stopped_or_gone_is_told_and_one_that_ended_in_order_is_not(tmp_path: Path) -> None:
    watched = Watched(tmp_path)
    watched.watch.log(2, {"time/step": 0.1, "step": 2.0})
    watched.watch.look()
    assert names(watched.run) == set() and names(watched.run, time.time() + 61) == {"RunSilent"}
    assert watched.run.heartbeat.is_fresh(time.time())
    watched.watch.stop(in_order=False)
    assert not watched.run.heartbeat.is_fresh(time.time()), "where the file system has no locks, nothing else says so"
    watched.run.release()
    assert names(watched.run) == set() and names(watched.run, time.time() + 61) == {"RunSilent"}
    watched.run.go_on(None)  # as the way out says
    assert names(watched.run, time.time() + 61) == set()
    watched.watch._started = 1.0
    watched.watch.stop(in_order=True)
    assert names(watched.run, time.time() + 61) == set()


def test_after_a_resume_the_watch_counts_what_was_undone_as_status_does(watched: Watched) -> None:
    watched.watch.stop(in_order=False)
    undone = {"step": 1, "timestamp": time.time() - 5.0, "updates/skipped": 1.0}
    (watched.run.path / "metrics.void.jsonl").write_text(json.dumps(undone) + "\n")
    watched.watch = AlarmWatch(watched.run, watched.watch.config, watched.clock, (watched,))
    watched.watch.start()
    watched.watch.log(2, {"time/step": 0.1, "step": 2.0})
    assert watched.look() == {"UpdatesSkipped"}
    watched.watch.stop(in_order=True)


def test_an_alarm_that_held_when_a_run_broke_off_lasted_until_its_last_sign_of_life(watched: Watched) -> None:
    watched.watch.stop(in_order=False)
    began = time.time()  # after all that the run has said
    watched.run.alarms.add(AlarmChange(began, 1, "RewardFailing", "critical", True, "it fails"))
    watched.run.heartbeat.write(Heartbeat(began + 60.0, "scoring", began, 1.0, {"run/started": began}, {}))
    watched.run.release()
    (row,) = _alarm_table(watched.run).rows
    assert row[0] == "RewardFailing" and row[3] == "1 min"


def test_the_heartbeat_of_a_run_is_no_progress_of_its_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(alarm_watch, "EVERY_S", 0.01)
    watched = Watched(tmp_path)
    beat, looks = watched.run.heartbeat, [0]
    write = beat.write

    def counted(one: Heartbeat) -> None:
        write(one)
        looks[0] += 1

    monkeypatch.setattr(type(beat), "write", lambda _, one: counted(one))
    while looks[0] < 2:
        time.sleep(0.01)
    before, seen = progress.made_at(), looks[0]
    while looks[0] < seen + 3:
        time.sleep(0.01)
    assert progress.made_at() == before, "a driver that hangs would never be found"
    watched.watch.stop(in_order=True)
    watched.run.release()


def test_nothing_that_fails_in_the_watch_ends_a_run(watched: Watched, project_log: io.StringIO) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("Ray has gone")

    watched.log = broken  # type: ignore[method-assign]
    events.count("groups/lost")
    for _ in range(3):
        watched.watch._guarded("read", watched.watch.look)
    assert project_log.getvalue().count("Ray has gone") == 1
    assert names(watched.run) == {"GroupLost"}


def test_what_is_read_every_few_seconds_is_what_the_registry_says(watched: Watched) -> None:
    watched.watch.engines_down = lambda: 0.0
    with events.call("reward"):
        pass
    with watched.clock.phase("update"):
        pass
    with watched.clock.phase("update"):
        watched.look()
    known = {metric.name for metric in REGISTRY.groups()[STATE] if metric.kind == "gauge"}
    assert set(watched.told[-1]) == known - {"limit/commit"} | {"limit/commit"}


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(alarm_watch, "EVERY_S", 0.1)
    with signals_as_before():
        yield


@pytest.mark.early
def test_a_reward_source_that_stalls_and_then_fails_is_told_and_mending_it_helps(
    tmp_path: Path, at_once: None, project_log: io.StringIO, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(
        "ppo", tmp_path, "steps=6", f"run.stall_floor_s={STALL_FLOOR_S}", "data.world.prompts=24",
        f"reward={{function: '{tmp_path}/judge.py:lengths', hold_s: 600.0}}",
    )  # fmt: skip
    path = Path(config.run.root) / config.run.name
    (tmp_path / "judge.py").write_text(JUDGE.replace("METRICS", repr(str(path / "metrics.jsonl"))))
    seen: dict[str, Any] = {}

    def until(what: str, holds: Callable[[], bool]) -> None:
        limit = time.monotonic() + 300
        while not holds():
            assert time.monotonic() < limit, what
            time.sleep(0.05)

    def told(alarm: str, *, began: bool) -> bool:
        """What the run says; status looks at any time, a run now and then."""
        return any((change.alarm, change.began) == (alarm, began) for change in RunDirectory(path).alarms.read())

    def mend_it() -> None:
        try:
            until("stalled", lambda: path.exists() and told("RewardStalled", began=True))
            until("stalled in status", lambda: "RewardStalled" in names(RunDirectory(path)))
            seen["while stalled"] = names(RunDirectory(path))
            assert main(["status", str(path), "--json"]) == 0
            (tmp_path / "continued").touch()
            until("over", lambda: told("RewardStalled", began=False))
            until("over in status", lambda: "RewardStalled" not in names(RunDirectory(path)))
            until("failing", lambda: told("RewardFailing", began=True))
            until("failing in status", lambda: "RewardFailing" in names(RunDirectory(path)))
            seen["while failing"] = names(RunDirectory(path))
        except BaseException as error:
            seen["error"] = repr(error)
        finally:
            (tmp_path / "continued").touch()
            (tmp_path / "back").touch()

    mending = threading.Thread(target=mend_it)
    mending.start()
    run = train(config)
    mending.join(300)
    assert "error" not in seen, seen
    assert seen["while stalled"] == {"RewardStalled"} and seen["while failing"] == {"RewardFailing"}
    assert run.metrics.read()[-1]["step"] == 6 and run.is_finished and names(run) == set()
    holding = set[str]()
    for change in run.alarms.read():
        if change.began:
            assert not holding & {"RewardStalled", "RewardFailing"}, "which explain all else"
            holding.add(change.alarm)
        else:
            holding.remove(change.alarm)
    began = [change.alarm for change in run.alarms.read() if change.began]
    # A busy machine may be late with anything, and the phase of a call is overdue a moment before the call is.
    assert [alarm for alarm in began if alarm not in OVERDUE] == ["RewardStalled", "RewardFailing"]
    (shown,) = json.loads(capsys.readouterr().out)["alarms"]
    assert shown["alarm"] == "RewardStalled" and "above" in shown["reading"] and "reward.timeout_s" in shown["way_out"]
    log = project_log.getvalue()
    assert "RewardFailing (critical): The reward source does not answer" in log and "RewardStalled is over after" in log
    page = write_report([run]).read_text()
    assert (
        "<h2>Alarms</h2>" in page
        and page.count("RewardStalled") == 1
        and "is above" not in page.split("RewardStalled")[0]
    )


@pytest.mark.early
def test_an_update_that_is_not_finite_is_told(tmp_path: Path, at_once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    accumulate, calls = Group.accumulate, []

    def poisoned(group: Group, shared: Any, update: Any, loss: Any, denominator: float) -> Any:
        calls.append(denominator)
        return accumulate(group, shared, update, loss, 1e-60 if len(calls) == 2 else denominator)

    monkeypatch.setattr(Group, "accumulate", poisoned)
    run = train(config_of("sft", tmp_path, "epochs=1"))
    assert len(calls) >= 3
    assert {change.alarm for change in run.alarms.read()} == {"UpdatesSkipped"}
    assert [change.began for change in run.alarms.read()] == [True, False], "a run that ended in order has no alarms"
