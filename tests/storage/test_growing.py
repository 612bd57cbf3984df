"""One process writes a file of lines, another goes on with it, and nothing of others is touched."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray import storage
from rlhf_ray.errors import DiskFullError, RequestError
from rlhf_ray.storage.growing import GrowingFile

MADE_OF = {"input": "abc", "limits": (1, 2)}


def content(root: Path) -> dict[str, object]:
    return {
        path.name: os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
        for path in root.iterdir()
    }


def test_a_second_writer_is_refused_by_the_name_of_the_first_and_loses_nothing(tmp_path: Path) -> None:
    script = (
        "import sys, time, pathlib; from rlhf_ray.storage.growing import GrowingFile\n"
        "file = GrowingFile(pathlib.Path(sys.argv[1]), {'input': 'abc', 'limits': [1, 2]})\n"
        "file.extend(['one']); print('begun', flush=True); sys.stdin.read(1)\n"
        "file.extend(['two']); file.finish(); file.close()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(storage.__file__).parents[2])}
    path = tmp_path / "scores.jsonl"
    command = [sys.executable, "-c", script, str(path)]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    assert first.stdin is not None and first.stdout is not None and first.stdout.readline() == b"begun\n"
    for made_of in (MADE_OF, {"input": "other"}):
        with pytest.raises(RequestError, match=rf"is being written by process {first.pid} on .*another --output"):
            GrowingFile(path, made_of)
    first.communicate(b"x", timeout=30)
    assert first.returncode == 0
    assert content(tmp_path) == {"scores.jsonl": b"one\ntwo\n"}
    with pytest.raises(RequestError, match="exists and is finished"):
        GrowingFile(path, MADE_OF)


def test_what_was_interrupted_is_gone_on_with_where_it_is_made_of_the_same(tmp_path: Path) -> None:
    path = tmp_path / "scores.jsonl"
    with GrowingFile(path, MADE_OF) as file:
        file.extend(["one", "two"])
    path.write_bytes(path.read_bytes() + b"torn")
    with pytest.raises(RequestError, match="was begun with another input, model or limit"):
        GrowingFile(path, {"input": "abc"})
    assert path.read_bytes() == b"one\ntwo\ntorn"
    with GrowingFile(path, MADE_OF) as file:
        assert file.done == 2
        file.extend(["three"])
        file.finish()
    assert content(tmp_path) == {"scores.jsonl": b"one\ntwo\nthree\n"}


def test_a_disk_that_is_full_when_a_writer_goes_on_makes_no_finished_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "scores.jsonl"
    with GrowingFile(path, MADE_OF) as file:
        file.extend(["one"])

    def is_full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, pytest.raises(DiskFullError):
        patch.setattr(os, "pwrite", is_full)
        GrowingFile(path, MADE_OF)
    with GrowingFile(path, {**MADE_OF}) as file:
        assert file.done == 1


@pytest.mark.parametrize("before", [0, 1])
def test_a_disk_that_is_full_while_lines_are_added_is_one_sentence(tmp_path, before) -> None:
    script = (
        "import resource, signal, sys, pathlib; from rlhf_ray.storage.growing import GrowingFile\n"
        "from rlhf_ray.errors import StorageError\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    with GrowingFile(pathlib.Path(sys.argv[1]), {'input': 'abc'}) as file:\n"
        "        for _ in range(int(sys.argv[2])): file.extend(['one'])\n"
        "        file.extend(['x' * 5000])\n"
        "except StorageError as error: print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(storage.__file__).parents[2])}
    command = [sys.executable, "-c", script, str(tmp_path / "scores"), str(before)]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert "no file may be larger" in ended.stdout and ended.stderr == ""
    assert len(content(tmp_path)) == 2 * before


def test_a_writer_that_adds_no_line_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for path in (tmp_path / "there/scores", tmp_path / "new/deep/scores"):
        with GrowingFile(path, MADE_OF):
            assert path.exists()
    assert content(tmp_path) == {"there": None} and content(tmp_path / "there") == {}


FOREIGN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a finished file": (lambda path: path.write_text("mine"), "exists and is finished"),
    "an empty file": (lambda path: path.touch(), "exists and is finished"),
    "a link": (lambda path: path.symlink_to("elsewhere"), "is a link to elsewhere"),
    "a folder": (lambda path: path.mkdir(), "is a directory"),
    "a pipe": (os.mkfifo, "is a pipe"),
    "a note beside it": (
        lambda path: path.with_name("out.unfinished").write_text("my notes"),
        "was not written by this",
    ),
    "an object beside it": (
        lambda path: path.with_name("out.unfinished").write_text('{"text": "my only row"}'),
        "was not written by this",
    ),
    "a list beside it": (lambda path: path.with_name("out.unfinished").write_text("[1]"), "was not written by this"),
    "a binary beside it": (
        lambda path: path.with_name("out.unfinished").write_bytes(b"\xff"),
        "was not written by this",
    ),
    "a link beside it": (lambda path: path.with_name("out.unfinished").symlink_to("elsewhere"), "is a link"),
    "a folder beside it": (lambda path: path.with_name("out.unfinished").mkdir(), "is a directory"),
}


@pytest.mark.parametrize("foreign", FOREIGN)
def test_what_somebody_else_put_there_is_refused_and_stays(tmp_path: Path, foreign: str) -> None:
    make, message = FOREIGN[foreign]
    make(tmp_path / "out")
    before = content(tmp_path)
    with pytest.raises(RequestError, match=message):
        GrowingFile(tmp_path / "out", MADE_OF)
    assert content(tmp_path) == before


def test_what_the_lines_are_made_from_is_not_taken_for_a_finished_file(tmp_path: Path) -> None:
    for name in ("scores", "scores.unfinished"):
        (tmp_path / name).write_text("{}\n")
        with pytest.raises(RequestError, match="is a file that this command reads"):
            GrowingFile(tmp_path / "scores", MADE_OF, reads=[tmp_path / name])
        assert content(tmp_path) == {name: b"{}\n"}
        (tmp_path / name).unlink()


@pytest.mark.parametrize("place", ["/dev/null", "/dev/full", "/dev/stdout"])
def test_lines_are_kept_in_files_only(place: str) -> None:
    before = os.lstat(place)[:4]
    with pytest.raises(RequestError, match=r"name a file|is a link|finished"):
        GrowingFile(Path(place), MADE_OF)
    assert os.lstat(place)[:4] == before and not os.path.exists(f"{place}.unfinished")


@pytest.mark.parametrize("place", ["/proc/rlhf/scores", "file/scores", "x" * 300])
def test_a_place_that_cannot_be_is_a_sentence(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RequestError, match="cannot use"):
        GrowingFile(tmp_path / place, MADE_OF)
    assert content(tmp_path) == {"file": b""}
