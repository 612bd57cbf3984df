"""A run begins in a directory that holds nothing of others, and removes and replaces nothing that it has not made."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.errors import CapacityError, RequestError, StorageError
from rlhf_ray.launch import driver
from rlhf_ray.runs import RunDirectory, write_report
from rlhf_ray.storage.atomic import PENDING
from rlhf_ray.storage.made import temporary_name

CONFIG = "kind: ppo\n"
Content = Mapping[str, tuple[str, object]]


def content(root: Path) -> Content:
    """All that lies below a directory: its kind, and what it holds or where it leads."""
    found: dict[str, tuple[str, object]] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = ("link", os.readlink(path))
        else:
            found[name] = ("directory", None) if path.is_dir() else ("file", path.read_bytes())
    return found


def a_repository(path: Path) -> None:
    (path / ".git").mkdir()
    (path / ".git/HEAD").write_text("ref: main")


FOREIGN: dict[str, Callable[[Path], object]] = {
    "a repository": a_repository,
    "secrets": lambda path: (path / ".env").write_text("KEY=1"),
    "a lock of another program": lambda path: (path / ".lock").write_text("pid 4"),
    "a link called .lock": lambda path: (path / ".lock").symlink_to("../elsewhere/mine"),
    "a directory called .lock": lambda path: (path / ".lock").mkdir(),
    "something pending": lambda path: (path / ".pending-thesis").mkdir(),
    "a pending file of others": lambda path: (path / ".pending-config.yaml-0123456789ab").write_text("mine"),
    "something that we would call so": lambda path: (path / temporary_name("thesis", PENDING)).write_text("mine"),
    "something replaced": lambda path: (path / ".replaced-notes-0123456789ab").write_text("mine"),
    "a plain file": lambda path: (path / "thesis.tex").write_text("mine"),
    "a folder that a run has too": lambda path: (path / "samples").mkdir(),
    "a link": lambda path: (path / "final").symlink_to("../elsewhere"),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_a_directory_that_holds_anything_of_others_is_refused_and_stays_as_it_is(tmp_path: Path, foreign: str) -> None:
    path, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    path.mkdir()
    elsewhere.mkdir()
    (elsewhere / "mine").write_text("mine")
    FOREIGN[foreign](path)
    before = content(tmp_path)
    with pytest.raises(RequestError, match=r"is not empty and is not a run \(it holds .*choose another run\.name"):
        RunDirectory.create(path, CONFIG)
    assert content(tmp_path) == before


def test_what_a_killed_start_left_is_no_hindrance(tmp_path: Path) -> None:
    (tmp_path / ".lock").write_text("process 12 on vm")
    (tmp_path / temporary_name("config.yaml", PENDING)).write_text("kin")
    run = RunDirectory.create(tmp_path, CONFIG)
    assert sorted(content(tmp_path)) == [".lock", "attempts.jsonl", "config.yaml"]
    run.release()


def fail_after(writes: Callable[[RunDirectory], object], error: Exception) -> Callable[..., object]:
    def train(config: object, run: RunDirectory, checkpoint: object, *, place: object) -> None:
        for name in ("rollout-start", "evaluation", "tensorboard", "trackers", "wandb"):
            (run.path / name).mkdir()
        run.samples.mkdir()
        writes(run)
        raise error

    return train


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Begin a run whose trainer writes something and is then refused before its first step."""

    def begin(
        root: Path, writes: Callable[[RunDirectory], object] = lambda run: None, error: Exception | None = None
    ) -> None:
        error = error or RequestError("the reward model has another tokenizer")
        monkeypatch.setattr(driver, "import_object", lambda path: fail_after(writes, error))
        with pytest.raises(type(error), match=str(error)):
            driver.train_new_run(dump_config(load_config("demo-sft", ["run.name=run", f"run.root={root}"])))

    return begin


@pytest.mark.parametrize("error", [CapacityError("the job does not fit"), StorageError("disk full"), None])
def test_a_run_that_is_refused_leaves_nothing_of_its_own(
    tmp_path: Path, refused: Callable[..., None], error: Exception | None
) -> None:
    refused(tmp_path / "new/deep", error=error)
    assert content(tmp_path / "new/deep") == {}
    (tmp_path / "root").mkdir()
    refused(tmp_path / "root", error=error)
    assert content(tmp_path / "root") == {}
    (tmp_path / "root/run").mkdir()
    refused(tmp_path / "root", error=error)
    assert content(tmp_path / "root") == {"run": ("directory", None)}, "it was there before"


def test_a_run_that_is_refused_removes_nothing_of_others(tmp_path: Path, refused: Callable[..., None]) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/mine").write_text("mine")

    def meanwhile(run: RunDirectory) -> None:
        a_repository(run.path)
        (run.path / ".env").write_text("KEY=1")
        (run.path / "notes.md").write_text("mine")
        (run.path / ".pending-thesis").write_text("mine")
        (run.path / "best").symlink_to("../elsewhere")

    refused(tmp_path, meanwhile)
    assert content(tmp_path).keys() == {
        "elsewhere", "elsewhere/mine", "run", "run/.git", "run/.git/HEAD", "run/.env", "run/notes.md", "run/.pending-thesis",
    }  # fmt: skip
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "place").mkdir()
    (tmp_path / "run").symlink_to("place")
    refused(tmp_path)
    assert content(tmp_path / "place") == {}
    assert (tmp_path / "run").is_symlink(), "a link of the user's"


def test_a_run_that_has_begun_is_never_discarded(tmp_path: Path, refused: Callable[..., None]) -> None:
    refused(tmp_path, lambda run: run.metrics.append({"step": 1, "timestamp": 1.0}))
    assert (tmp_path / "run/config.yaml").is_file()


def test_nobody_but_its_owner_may_write_into_a_run_directory(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        RunDirectory.create(tmp_path / "root/run", CONFIG).release()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "root/run").stat().st_mode) == 0o750


def test_a_report_takes_the_place_of_a_report_only(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", CONFIG)
    write_report([run])
    write_report([run])
    mine = tmp_path / "mine.html"
    mine.write_text("mine")
    with pytest.raises(RequestError, match="exists already: name another file, or write over it with --overwrite"):
        write_report([run], mine)
    run.report_path.unlink()
    run.report_path.symlink_to(mine)
    with pytest.raises(RequestError, match=r"report\.html is no file, so no report takes its place"):
        write_report([run])
    assert mine.read_text() == "mine"
    assert "<html" in write_report([run], mine, overwrite=True).read_text()
