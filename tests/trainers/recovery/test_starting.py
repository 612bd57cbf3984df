"""The start of a run over the loss of what loads: who is started again, how often, and what of it is on disk.

Groups and engines are stand-ins here, whose loading the test holds; runs with the real ones are in ``test_lost_at_start.py``.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlhf_ray.actors.loading import Loading
from rlhf_ray.errors import DeadlineError, DeadRankError, GroupError, Interrupted, ModelLoadError, StalledError
from rlhf_ray.pending import Pending
from rlhf_ray.processes.spans import Recorder, sending
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.incidents import Incident
from rlhf_ray.runs.reporting import _interruption
from rlhf_ray.trainers.recovery import Recovery, Starting, loads_again

ROLES = ("policy", "critic", "reference", "reward-helpful", "rollout")
DEATHS: Sequence[type[GroupError]] = (DeadRankError, StalledError)
OTHERS: Sequence[type[GroupError]] = (GroupError, DeadlineError)


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", [*DEATHS, *OTHERS])
@pytest.mark.parametrize("most", [0, 1, 3])
def test_a_death_is_tried_again_as_often_as_allowed_and_the_same_error_once(
    role: str, kind: type[GroupError], most: int
) -> None:
    before: list[GroupError] = []
    while loads_again(error := kind(role, 0, "setup", f"it needs {len(before)} GiB"), before, most=most):
        before.append(error)
    assert len(before) == (most if kind in DEATHS else min(most, 1))


def test_errors_are_the_same_but_for_their_numbers_and_further_lines() -> None:
    def again(cause: str, phase: str = "setup", kind: type[GroupError] = GroupError) -> bool:
        first = GroupError("critic", 0, "setup", "OutOfMemoryError('20 MiB, 7 free at 0xab12')\nTraceback 1")
        return loads_again(kind("critic", 1, phase, cause), [first], most=3)

    assert not again("OutOfMemoryError('30 MiB, 1 free at 0xff')\nTraceback 2")
    assert again("OSError('a disk')") and again("OutOfMemoryError('20 MiB, 7 free at 0xab12')", phase="node_address")
    assert again("OutOfMemoryError('20 MiB, 7 free at 0xab12')", kind=DeadlineError)


class Part:
    """A group, or an engine, that answers with ``outcomes`` one after the other."""

    def __init__(self, role: str, *outcomes: Any, rank: int | None = None, waits: bool = False) -> None:
        self.outcomes, self.loads, self.restarts = list(outcomes), 0, 0
        self.loading = Loading(role, self.load, self.restart, nullcontext(), rank, waits)
        self.on_restart: Callable[[], None] = lambda: None
        self.before_load: Callable[[], object] = lambda: None

    def load(self) -> Pending[Any]:
        self.before_load()
        outcome = self.outcomes[min(self.loads, len(self.outcomes) - 1)]
        self.loads += 1

        def wait() -> Any:
            if isinstance(outcome, Exception):
                raise outcome
            return outcome() if callable(outcome) else outcome

        return Pending(wait)

    def restart(self) -> None:
        self.restarts += 1
        self.on_restart()


def starting(path: Path, *, groups: int = 3, engines: int = 3, step: int | None = None) -> Starting:
    config: Any = SimpleNamespace(
        run=SimpleNamespace(max_group_restarts=groups), rollout=SimpleNamespace(max_restarts=engines)
    )
    checkpoint: Any = None if step is None else SimpleNamespace(step=step)
    return Starting(RunDirectory.create(path / "run", "kind: ppo\n"), config, checkpoint)


def incidents(path: Path) -> list[Incident]:
    return RunDirectory(path / "run").incidents.read()


def died(role: str, rank: int = 0) -> DeadRankError:
    return DeadRankError(role, rank, "setup", "its process died")


@pytest.mark.timeout(20)
def test_what_is_lost_loads_again_while_the_others_still_load(tmp_path: Path) -> None:
    again = threading.Event()
    slow = Part("policy", lambda: again.wait(10.0))
    lost = Part("critic", died("critic", 1), "critic")
    lost.on_restart = again.set
    begin = starting(tmp_path, step=4)
    assert begin.load({"policy": slow.loading, "critic": lost.loading}) == {"policy": True, "critic": "critic"}
    assert (slow.loads, slow.restarts, lost.loads, lost.restarts) == (1, 0, 2, 1)
    (one,) = incidents(tmp_path)
    assert (one.role, one.rank, one.fault, one.phase, one.action) == ("critic", 1, "died", "start", "restarted")
    assert (one.step, one.back_to, one.lost_steps) == (4, 4, 0) and one.seconds >= 0.0
    assert begin.losses == {"critic": 1}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("lost", [False, True], ids=["at first", "when it was started again"])
def test_a_part_that_waits_for_its_processes_keeps_no_other_from_its_start(lost: bool, tmp_path: Path) -> None:
    """Its ranks meet only once the other part, which is begun or started again later, is there."""
    there, names = threading.Event(), list[str]()
    waiting = Part("policy", *([died("policy")] if lost else []), "policy", waits=True)
    waiting.before_load = lambda: (
        names.append(threading.current_thread().name),
        waiting.loads < lost or there.wait(30),
    )
    other = Part("critic", *([died("critic")] if lost else []), "critic")
    other.before_load = lambda: other.loads < lost or there.set()
    parts = {"policy": waiting.loading, "critic": other.loading}
    assert starting(tmp_path).load(parts) == {"policy": "policy", "critic": "critic"}
    assert there.is_set() and names == ["loading policy"] * (1 + lost)


def test_an_error_of_what_waits_is_that_of_its_loading(tmp_path: Path) -> None:
    part, errors = Part("policy", "policy", waits=True), [died("policy"), died("policy", 1)]

    def fail() -> None:
        if errors:
            raise errors.pop()

    part.before_load = fail
    assert starting(tmp_path).load({"policy": part.loading}) == {"policy": "policy"}
    assert [one.rank for one in incidents(tmp_path)] == [1, 0] and part.restarts == 2
    part.before_load = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        starting(tmp_path / "other").load({"policy": part.loading})


def test_what_waits_makes_its_calls_in_the_span_that_the_start_is_in(tmp_path: Path) -> None:
    part, recorder = Part("policy", "policy", waits=True), Recorder(tmp_path, "driver")
    sent: list[Any] = []
    part.before_load = lambda: sent.append(sending("policy", "setup"))
    with recorder.span("start", "phase"):
        expected = sending("policy", "setup")
        starting(tmp_path).load({"policy": part.loading})
    assert expected is not None and [one.context.parent for one in sent] == [expected.context.parent]


def test_engines_have_a_budget_of_their_own_each(tmp_path: Path) -> None:
    fine, often = Part("rollout", "ready", rank=0), Part("rollout", died("rollout"), died("rollout"), "ready", rank=1)
    begin = starting(tmp_path, groups=0, engines=2)
    begin.load({"rollout engine 0": fine.loading, "rollout engine 1": often.loading})
    assert (fine.loads, often.loads) == (1, 3) and not begin.losses
    assert [(one.role, one.rank) for one in incidents(tmp_path)] == [("rollout", 1), ("rollout", 1)]
    with pytest.raises(DeadRankError):
        starting(tmp_path / "none", engines=0).load({"rollout engine 0": Part("rollout", died("rollout")).loading})


@pytest.mark.parametrize(
    ("error", "loads"),
    [
        (died("critic"), 4), (GroupError("critic", 0, "setup", "OSError('disk')"), 2), (ModelLoadError("there is none"), 1),
        (GroupError("all", None, "setup", "another role does not make room"), 1),
    ],
)  # fmt: skip
def test_what_does_not_get_better_ends_the_start_with_its_error(error: Exception, loads: int, tmp_path: Path) -> None:
    part = Part("critic", error)
    with pytest.raises(type(error)) as caught:
        starting(tmp_path).load({"policy": Part("policy", "ready").loading, "critic": part.loading})
    assert caught.value is error and (part.loads, part.restarts) == (loads, loads - 1)
    kept = incidents(tmp_path)
    assert [one.action for one in kept] == ["stopped"] * (loads if isinstance(error, GroupError) else 0)


def test_a_loss_between_loading_and_the_trainer_restarts_its_group_and_asks_again(tmp_path: Path) -> None:
    policy, critic = Part("policy", "ready"), Part("critic", "ready")
    begin, asked = starting(tmp_path), list[str]()
    begin.load({"policy": policy.loading, "critic": critic.loading})

    def ask() -> str:
        asked.append("asked")
        if len(asked) < 3:
            raise died("critic")
        return "answer"

    assert begin.surviving(ask) == "answer"
    assert (policy.loads, critic.loads, critic.restarts) == (1, 3, 2)
    assert [one.action for one in incidents(tmp_path)] == ["restarted", "restarted"]
    with pytest.raises(GroupError, match="nobody"):
        begin.surviving(lambda: (_ for _ in ()).throw(died("nobody")))


def test_a_request_to_stop_ends_the_start_at_once_and_leaves_the_loss_on_disk(tmp_path: Path) -> None:
    part = Part("critic", died("critic"), "ready")

    def stop() -> None:
        raise Interrupted(15)

    part.on_restart = stop
    with pytest.raises(Interrupted):
        starting(tmp_path).load({"critic": part.loading})
    assert [one.action for one in incidents(tmp_path)] == ["stopped"]


def test_an_incident_that_cannot_be_written_takes_no_place_of_the_loss(
    tmp_path: Path, project_log: io.StringIO
) -> None:
    begin, loss = starting(tmp_path, groups=1), died("critic", 1)
    (tmp_path / "run" / "incidents.jsonl").mkdir()
    lost = [Part("critic", died("critic"), loss), Part("policy", "policy")]
    with pytest.raises(DeadRankError) as caught:
        begin.load({"critic": lost[0].loading, "policy": lost[1].loading})
    assert caught.value is loss
    assert "critic: its loss could not be written to the incidents: " in project_log.getvalue()
    assert "incidents.jsonl is not a regular file" in project_log.getvalue()


def test_so_it_is_where_a_loss_ends_a_run_that_trains(tmp_path: Path, project_log: io.StringIO) -> None:
    run, loss = RunDirectory.create(tmp_path / "run", "kind: ppo\n"), died("critic", 1)
    (run.path / "incidents.jsonl").mkdir()
    checkpoints: Any = SimpleNamespace(run=run, committed=None, groups={})
    trainer: Any = SimpleNamespace(finished_step=3)
    recovery = Recovery([], checkpoints, SimpleNamespace(max_group_restarts=3))  # type: ignore[arg-type]
    with pytest.raises(DeadRankError) as caught:
        recovery.survive(loss, trainer)
    assert caught.value is loss
    assert "critic: its loss could not be written to the incidents: " in project_log.getvalue()


@pytest.mark.parametrize(
    ("last", "said"),
    [
        (died("policy"), "fails with an error of policy: the run ends"),
        (died("critic", 1), "fails once more: the run ends"),
        (GroupError("critic", 0, "setup", "OSError('disk')"), "fails with the same error: the run ends"),
    ],
)
def test_the_log_says_with_what_a_part_that_was_started_again_fails(
    last: GroupError, said: str, tmp_path: Path, project_log: io.StringIO
) -> None:
    first = last if type(last) is GroupError else died("critic")
    with pytest.raises(GroupError):
        starting(tmp_path, groups=1 if said.startswith("fails once") else 3).load(
            {"critic": Part("critic", first, last).loading}
        )
    assert f"(run.max_group_restarts), and {said}" in project_log.getvalue()


@pytest.mark.parametrize(
    ("phase", "fault", "repeats"),
    [("start", "died", False), ("start", "error", False), ("start", "stalled", True), ("update", "died", True)],
)
def test_a_start_that_goes_on_is_none_that_is_repeated(phase: str, fault: Any, repeats: bool) -> None:
    one = Incident(10.0, 0, phase, "critic", 0, fault, "it died", "restarted", 0, 0, 2.0)
    assert _interruption(one).repeats is repeats
