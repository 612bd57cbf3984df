"""``track`` names what is wrong with a request before it starts anything."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from rlhf_ray.cli.main import main
from rlhf_ray.trackers import catching_up
from rlhf_ray.trackers.state import State, StateFile
from tests.trackers.small_run import SmallRun


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SmallRun:
    monkeypatch.setattr(catching_up, "follow", lambda *_, **__: pytest.fail("a tracker was fed"))
    return SmallRun(tmp_path)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "has no monitoring.trackers: name one, as in rlhf-ray track"),
        (["--to", "wanbd"], "--to: 'wanbd' is no tracker: did you mean wandb?"),
        (["--to", "jsonl"], "--to: jsonl needs a file: write jsonl:FILE"),
        (["--to", "jsonl:a", "--to", "jsonl:a"], "jsonl:a stands there 2 times"),
        (["--to", "jsonl:a", "--project", "a/b"], "--project 'a/b' is not a name of at most 100 letters"),
    ],
)
def test_what_is_wrong_is_told(
    words: list[str], told: str, small: SmallRun, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["track", str(small.run.path), *words]) == 2
    assert told in capsys.readouterr().err


def test_a_directory_that_is_no_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["track", str(tmp_path), "--to", "jsonl:a"]) == 2
    assert "is not a run directory: it has no config.yaml" in capsys.readouterr().err


def test_a_missing_package_is_told(
    small: SmallRun, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        catching_up, "missing", lambda wanted: "trackio is not installed: pip install 'rlhf-ray[trackio]'"
    )
    assert main(["track", str(small.run.path), "--to", "trackio"]) == 2
    assert "pip install 'rlhf-ray[trackio]'" in capsys.readouterr().err


def test_the_trackers_of_the_config_are_fed_and_the_exit_code_says_whether_one_lacks_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, project_log: io.StringIO
) -> None:
    small = SmallRun(tmp_path, f"monitoring.trackers=[tensorboard, 'jsonl:{tmp_path}/a']", "monitoring.project=mine")
    asked = {}

    def follow(run: object, targets: list[object], **options: object) -> dict[object, str]:
        asked.update(options, targets=[str(one) for one in targets])
        return {targets[0]: "the disk is full"} if "lacks" in asked else {}

    monkeypatch.setattr(catching_up, "follow", follow)
    assert main(["track", str(small.run.path)]) == 0
    assert asked["targets"] == ["tensorboard", f"jsonl:{tmp_path}/a"] and asked["project"] == "mine"
    assert asked["live"] is False and asked["patient"] is False
    asked["lacks"] = True
    assert main(["track", str(small.run.path), "--live", "--project", "other"]) == 1
    assert asked["live"] is True and asked["project"] == "other"
    err = project_log.getvalue()
    assert "the tracker tensorboard has not got everything: the disk is full. To send the rest: rlhf-ray track" in err


def test_status_shows_how_far_each_tracker_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from rlhf_ray.config.trackers import target

    small = SmallRun(tmp_path)
    file = StateFile(small.run.path, target("mlflow"))
    file.path.parent.mkdir()
    file.write(State("small", "abcd", "mlflow", {"run": 7}, error="the server is away"))
    assert main(["status", str(small.run.path)]) == 0
    assert "tracker mlflow  run up to step 7; failed last: the server is away" in capsys.readouterr().out
