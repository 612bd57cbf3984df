"""``best/`` holds the weights of the update that the state names, or is not there, whatever was killed when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.storage.manifest import FileRecord, hash_files
from rlhf_ray.trainers.supervised.best import Best

FIGURE = "evaluation/accuracy"


class Killed(Exception):
    """The process is gone."""


class Process:
    """A run that evaluates after every update and checkpoints before it keeps; the weights are the number of the update."""

    def __init__(self, run: RunDirectory, accuracies: list[float]) -> None:
        self.run, self.accuracies = run, accuracies
        self.committed: tuple[int, object] | None = None
        self.evaluated: dict[int, dict[str, float]] = {}
        """What the metrics hold of each update."""

    def go(self, *, commits_every: int, killed: Callable[[str, int], bool]) -> Best:
        """From the last commit to the end, or to where it is killed."""
        start, state = self.committed or (0, None)
        self.update = start
        best = Best(self.run, FIGURE, lambda pending, figures: self.write(pending.path, figures))
        best.restore(state, start, self.evaluated.get(start, {}))
        for update in range(start + 1, len(self.accuracies) + 1):
            self.update = update
            self.evaluated[update] = {FIGURE: self.accuracies[update - 1]}
            improved = best.improves(update, self.evaluated[update])
            if killed("before the commit", update):
                raise Killed
            if commits_every and (improved or update % commits_every == 0):
                self.committed = (update, best.state())
            if killed("after the commit", update):
                raise Killed
            if improved:
                best.keep()
            if killed("after keeping", update):
                raise Killed
        return best

    def write(self, directory: Path, figures: object) -> dict[str, FileRecord]:
        (directory / "config.json").write_text(str(self.update))
        return hash_files(directory)

    @property
    def kept(self) -> int | None:
        path = self.run.best / "config.json"
        return int(path.read_text()) if path.exists() else None


MOMENTS = ["before the commit", "after the commit", "after keeping"]


@settings(deadline=None, max_examples=60)
@given(
    accuracies=st.lists(st.sampled_from([0.5, 0.6, 0.7, 0.8]), min_size=1, max_size=8),
    every=st.integers(0, 3),
    kills=st.lists(st.tuples(st.sampled_from(MOMENTS), st.integers(1, 8)), max_size=3),
)
def test_it_ends_with_the_earliest_of_the_best_updates(
    tmp_path_factory: pytest.TempPathFactory, accuracies: list[float], every: int, kills: list[tuple[str, int]]
) -> None:
    process = Process(RunDirectory.create(tmp_path_factory.mktemp("best") / "run", "kind: rm\n"), accuracies)
    left = list(kills)

    def killed(moment: str, update: int) -> bool:
        if (moment, update) in left:
            left.remove((moment, update))
            return True
        return False

    while True:
        try:
            best = process.go(commits_every=every, killed=killed)
        except Killed:
            continue
        break
    expected = accuracies.index(max(accuracies)) + 1
    assert best.so_far is not None and best.so_far.update == expected == process.kept


def test_a_best_that_belongs_to_no_commit_is_void(tmp_path: Path) -> None:
    """Checkpointer without evaluations in between: a later best has taken the place of the one that the commit names."""
    run = RunDirectory.create(tmp_path / "run", "kind: rm\n")
    process = Process(run, [0.6])
    best = process.go(commits_every=0, killed=lambda *_: False)
    process.update, state = 2, best.state()
    best.improves(2, {FIGURE: 0.9})
    best.keep()
    again = Best(run, FIGURE, lambda pending, figures: {})
    again.restore(state, 5, {})
    assert again.so_far is None and not run.best.exists()


def test_an_evaluation_without_the_figure_is_never_the_best(tmp_path: Path) -> None:
    best = Best(RunDirectory.create(tmp_path / "run", "kind: rm\n"), FIGURE, lambda pending, figures: {})
    assert not best.improves(1, {"evaluation/loss": 0.1}) and best.state() is None


def test_the_end_of_a_shorter_run_stays_the_best_when_it_is_trained_further(tmp_path: Path) -> None:
    """Its last evaluation was its best, so that ``final/`` held those weights and ``best/`` was removed."""
    process = Process(RunDirectory.create(tmp_path / "run", "kind: rm\n"), [0.5, 0.6, 0.9])
    best = process.go(commits_every=1, killed=lambda *_: False)
    process.committed = (
        3,
        {"update": 2, "figures": {FIGURE: 0.6}},
    )  # committed before the evaluation that closed the run
    best.remove()
    process.accuracies = [0.5, 0.6, 0.9, 0.7]
    best = process.go(commits_every=1, killed=lambda *_: False)
    assert best.so_far is not None and best.so_far.update == 3 == process.kept
