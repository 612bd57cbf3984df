"""``--output`` of every command writes there or refuses before the work; nothing that stands there is lost without a word."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from rlhf_ray.cli.main import main
from rlhf_ray.runs import RunDirectory

PAIR = '{"prompt": "a", "chosen": " b", "rejected": " c"}\n'


@pytest.fixture(params=["report", "evaluate --data-only"])
def words(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """A command that writes a file, without its ``--output``."""
    if request.param == "report":
        RunDirectory.create(tmp_path / "run", "kind: sft\n").release()
        return ["report", str(tmp_path / "run")]
    (tmp_path / "pairs.jsonl").write_text(PAIR)
    return ["evaluate", "--data-only", "--data", str(tmp_path / "pairs.jsonl")]


def test_a_file_that_stands_there_is_kept_unless_it_may_be_written_over(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "out"
    place.write_text("mine")
    assert main([*words, "--output", str(place)]) == 2
    assert (
        f"--output {place}: exists already: name another file, or write over it with --overwrite"
        in capsys.readouterr().err
    )
    assert place.read_text() == "mine"
    assert main([*words, "--output", str(place), "--overwrite"]) == 0
    assert place.read_text() != "mine"


def test_a_link_a_folder_and_the_null_device_stay_what_they_are(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to("mine")
    for place, message in (
        ("link", "is a link to mine"),
        (".", "is a directory"),
        ("no/out", "the folder .*no does not exist"),
    ):
        assert main([*words, "--output", str(tmp_path / place), "--overwrite"]) == 2
        assert message.replace(".*", f"{tmp_path}/") in capsys.readouterr().err
    assert (tmp_path / "link").is_symlink() and (tmp_path / "mine").read_text() == "mine"
    assert main([*words, "--output", "/dev/null"]) == 0
    assert stat.S_ISCHR(os.lstat("/dev/null").st_mode)


def test_what_a_command_reads_is_never_written_over(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    read = tmp_path / ("run/config.yaml" if words[0] == "report" else "pairs.jsonl")
    before = read.read_bytes()
    os.link(read, tmp_path / "the same")
    for place in (read, tmp_path / "the same"):
        assert main([*words, "--output", str(place), "--overwrite"]) == 2
        assert "is a file that this command reads: name another file" in capsys.readouterr().err
    assert read.read_bytes() == before


def test_a_place_that_is_refused_is_refused_before_anything_is_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--output", str(tmp_path)]
    assert main(["evaluate", "--data-only", "--data", str(tmp_path / "gone.jsonl"), *output]) == 2
    assert "is a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("root", "message"),
    [
        ("/proc/demo", "/proc/demo"),
        ("file/deep", "Not a directory"),
        ("old", "report.html: exists"),
        ("trained", "choose another run.name"),
    ],
)
def test_a_root_of_the_demo_that_cannot_be_written_to_is_told_before_anything_starts(
    tmp_path: Path, root: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_ray.launch.parent.start_demo", lambda *_: pytest.fail("the demo was started"))
    (tmp_path / "file").write_text("")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/report.html").write_text("mine")
    RunDirectory.create(tmp_path / "trained/ppo", "kind: ppo\n").release()
    assert main(["demo", "--root", str(tmp_path / root)]) == 2
    assert message in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["file", "old", "trained"]
    assert os.listdir(tmp_path / "trained") == ["ppo"]
