"""A tracker gets each step once, in order, whenever the process that feeds it ends; nothing of another run is mixed in."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.config.trackers import Target
from rlhf_ray.errors import IntegrityError, RequestError, StorageError
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.storage import jsonl
from rlhf_ray.storage.locks import take
from rlhf_ray.trackers import feeding
from rlhf_ray.trackers.base import Curve, Tracker
from rlhf_ray.trackers.feeding import Feeder
from rlhf_ray.trackers.making import make_tracker
from rlhf_ray.trackers.state import StateFile
from rlhf_ray.trackers.to_jsonl import JsonLinesTracker
from rlhf_ray.trackers.to_tensorboard import TensorBoardTracker
from tests.trackers.small_run import EXPECTED, EXPECTED_EVALUATIONS, SmallRun, crashed_at_9, ended_at_12
from tests.trackers.stores import Points, of_jsonl, of_tensorboard


def feed(
    run: RunDirectory,
    target: Target,
    *,
    tracker: Tracker | None = None,
    over: Callable[[float], bool] = lambda seconds: True,
    live: bool = False,
) -> None:
    file = StateFile(run.path, target)
    file.path.parent.mkdir(exist_ok=True)
    state = file.begin(run.path.name)
    Feeder(run, tracker or make_tracker(target), file, state, project="rlhf-ray", live=live, over=over).work()


def assert_one_curve(points: Points) -> None:
    """The whole run, each step once and in order, without what a resume undid."""
    loss = points["loss/sft"]
    assert [step for step, _ in loss] == list(EXPECTED), "each step once, and no fold back"
    assert dict(loss) == pytest.approx(EXPECTED)
    assert dict(points["evaluation/loss"]) == pytest.approx(EXPECTED_EVALUATIONS)
    assert len(points["evaluation/loss"]) == len(EXPECTED_EVALUATIONS)
    assert "grad_norm" not in points, "what was no number is left out"


@pytest.mark.parametrize("name", ["jsonl", "tensorboard"])
def test_a_resumed_run_is_one_curve(name: str, tmp_path: Path) -> None:
    small = crashed_at_9(tmp_path)
    target = Target(name, str(tmp_path / "lines.jsonl") if name == "jsonl" else "")

    def read() -> Points:
        return of_jsonl(tmp_path / "lines.jsonl") if target.place else of_tensorboard(small.run.path / "tensorboard")

    feed(small.run, target)
    assert [step for step, _ in read()["loss/sft"]] == [1, 2, 3, 4, 5, 6]
    ended_at_12(small)
    feed(small.run, target)
    assert_one_curve(read())
    feed(small.run, target)
    assert_one_curve(read())


class Killed(BaseException):
    """Ends the process at this moment."""


class Mortal:
    """Ends the process that feeds a tracker before or after one of its calls."""

    def __init__(self, tracker: Tracker, dies_at: int) -> None:
        self.tracker, self.left = tracker, dies_at

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.live_on()
            answer = getattr(self.tracker, name)(*arguments, **options)
            self.live_on()
            return answer

        return call

    def live_on(self) -> None:
        self.left -= 1
        if self.left == 0:
            raise Killed


@pytest.mark.parametrize("name", ["jsonl", "tensorboard"])
def test_a_kill_between_any_two_calls_loses_and_repeats_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeding, "ROWS_HELD", 6)
    small = crashed_at_9(tmp_path)
    ended_at_12(small)
    for dies_at in range(1, 100):
        target = Target(name, str(tmp_path / f"{name}-{dies_at}"))
        mortal = Mortal(make_tracker(target), dies_at)
        try:
            feed(small.run, target, tracker=mortal)  # type: ignore[arg-type]
            break
        except Killed:
            if isinstance(mortal.tracker, TensorBoardTracker):
                mortal.tracker.close(finished=False)  # what was written before the kill is in the file
            feed(small.run, target)
        place = Path(target.place)
        assert_one_curve(of_jsonl(place) if name == "jsonl" else of_tensorboard(place / "small"))
    assert dies_at > 30, "it was killed before and after each of its calls"


class Dying:
    """A writer of TensorBoard that dies at one of its values."""

    def __init__(self, writer: Any, lives: int) -> None:
        self.writer, self.lives = writer, lives

    def add_scalar(self, *arguments: Any, **options: Any) -> None:
        self.lives -= 1
        if self.lives < 0:
            raise Killed
        self.writer.add_scalar(*arguments, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.writer, name)


class DyingTensorBoard(TensorBoardTracker):
    def __init__(self, lives: int) -> None:
        super().__init__("")
        self.lives = lives

    def open(self, curve: Curve) -> int:
        last = super().open(curve)
        self._writer = Dying(self._writer, self.lives)  # type: ignore[assignment]
        return last


def test_half_a_row_of_a_killed_process_is_completed_and_not_repeated(tmp_path: Path) -> None:
    small = crashed_at_9(tmp_path)
    ended_at_12(small)
    for lives in (1, 0, 1, 3, 2, 5):  # within a row, at its end, and within a later one
        tracker = DyingTensorBoard(lives)
        with pytest.raises(Killed):
            feed(small.run, Target("tensorboard"), tracker=tracker)
        tracker.close(finished=False)
    feed(small.run, Target("tensorboard"))
    points = of_tensorboard(small.run.path / "tensorboard")
    assert_one_curve(points)
    assert [step for step, _ in points["step"]] == list(EXPECTED)


def test_live_each_attempt_is_a_curve_of_its_own(tmp_path: Path) -> None:
    small = crashed_at_9(tmp_path)
    target = Target("jsonl", str(tmp_path / "lines.jsonl"))
    feed(small.run, target, live=True)
    ended_at_12(small)
    feed(small.run, target, live=True)
    lines = JsonLinesTracker(target.place)._lines.read()
    assert {line["run"]: [one["step"] for one in lines if one["run"] == line["run"]] for line in lines} == {
        "small/attempt-1": [1, 2, 3, 4, 5, 6, 7, 8, 9],
        "small/attempt-2": [7, 8, 9, 10, 11, 12],
    }
    feed(small.run, Target("tensorboard"), live=True)
    assert [step for step, _ in of_tensorboard(small.run.path / "tensorboard/attempt-1")["loss/sft"]] == list(
        range(1, 10)
    )


def test_a_run_under_way_is_followed_commit_by_commit(tmp_path: Path) -> None:
    small, target = SmallRun(tmp_path), Target("jsonl", str(tmp_path / "lines.jsonl"))
    seen: list[list[int]] = []
    acts: list[Callable[[], None]] = [
        lambda: small.log(1, 2),
        lambda: small.commit(2),
        lambda: small.log(3),
        lambda: (small.evaluate(3), small.commit(3), small.log(4)),  # type: ignore[func-returns-value]
        small.finish,
    ]

    def over(seconds: float) -> bool:
        path = Path(target.place)
        seen.append([step for step, _ in of_jsonl(path).get("loss/sft", [])] if path.exists() else [])
        if len(seen) > len(acts):
            return True
        acts[len(seen) - 1]()
        return False

    feed(small.run, target, over=over)
    assert seen == [[], [], [1], [1, 2], [1, 2, 3], [1, 2, 3, 4]]


def test_a_torn_line_is_left_out_and_a_damaged_one_is_named(tmp_path: Path) -> None:
    small = crashed_at_9(tmp_path)
    target = Target("jsonl", str(tmp_path / "lines.jsonl"))
    with small.run.metrics.path.open("ab") as metrics:
        metrics.write(b'{"step": 10, "timest')
    feed(small.run, target)
    assert [step for step, _ in of_jsonl(Path(target.place))["loss/sft"]] == [1, 2, 3, 4, 5, 6]
    with small.run.metrics.path.open("ab") as metrics:
        metrics.write(b'\n{"step": 11, "timestamp": 1.0}\n')
    with pytest.raises(IntegrityError, match=r"metrics\.jsonl:11 is damaged .*: remove the line to continue"):
        feed(small.run, target)


def test_the_directory_of_another_run_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    place = tmp_path / "board"
    one, other = crashed_at_9(tmp_path / "one"), crashed_at_9(tmp_path / "other")
    feed(one.run, Target("tensorboard", str(place)))
    before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
    with pytest.raises(RequestError, match=r"board/small holds the events of another run, .* name another directory"):
        feed(other.run, Target("tensorboard", str(place)))
    assert {path: path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    (place / "small/rlhf_ray_run.txt").unlink()
    with pytest.raises(RequestError, match="another run"):
        feed(one.run, Target("tensorboard", str(place)))
    ended_at_12(other)
    feed(other.run, Target("tensorboard", str(tmp_path / "free")))
    assert_one_curve(of_tensorboard(tmp_path / "free/small"))


def test_a_copy_of_a_run_under_another_name_is_another_run(tmp_path: Path) -> None:
    small = crashed_at_9(tmp_path)
    file = StateFile(small.run.path, Target("wandb"))
    file.path.parent.mkdir()
    first = file.begin("small")
    assert file.begin("small").id == first.id != file.begin("copy").id


@pytest.mark.parametrize("content", ["", "[]", '{"run": 1}', '{"run": "small", "id": "x", "sent": {"run": "six"}}'])
def test_a_damaged_state_is_named_and_nothing_is_sent_as_another_run(content: str, tmp_path: Path) -> None:
    small, target = crashed_at_9(tmp_path), Target("jsonl", str(tmp_path / "lines.jsonl"))
    feed(small.run, target)
    file = StateFile(small.run.path, target)
    file.path.write_text(content)
    before = (tmp_path / "lines.jsonl").read_text()
    with pytest.raises(IntegrityError, match="is damaged, so nobody knows as which run"):
        feed(small.run, target)
    assert (tmp_path / "lines.jsonl").read_text() == before


def test_runs_that_share_a_file_wait_for_the_line_that_another_is_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, small = tmp_path / "lines.jsonl", crashed_at_9(tmp_path)
    with path.open("ab", buffering=0) as other:
        assert take(other.fileno())
        other.write(b'{"run": "other", "id": "other-1", ')
        ours = threading.Thread(target=feed, args=(small.run, Target("jsonl", str(path))))
        ours.start()
        by = time.monotonic() + 60
        while StateFile(small.run.path, Target("jsonl", str(path))).sent() != {"run": -1}:  # the file is open
            assert time.monotonic() < by
            time.sleep(0.05)
        ours.join(0.5)
        assert ours.is_alive()
        other.write(b'"step": 1, "timestamp": 1.0}\n')
    ours.join(60)
    assert not ours.is_alive()
    assert [(line["run"], line["step"]) for line in JsonLinesTracker(str(path))._lines.read()] == [
        ("other", 1), *(("small", step) for step in range(1, 7)),
    ]  # fmt: skip
    monkeypatch.setattr(jsonl, "LOCKED_S", 0.1)
    with path.open("ab") as other, pytest.raises(StorageError, match=r"has locked .* for 0\.1 s: end that one"):
        assert take(other.fileno())
        JsonLinesTracker(str(path))._lines.append({"step": 1})


def test_one_process_at_a_time_feeds_a_tracker(tmp_path: Path) -> None:
    first, second = (StateFile(tmp_path, Target("wandb")) for _ in range(2))
    assert first.own() and not second.own()
    assert second.owner().startswith("process ")
    assert StateFile(tmp_path, Target("mlflow")).own()
