"""What a user names for output is written there or refused before the work, and nothing of others is replaced."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_ray.errors import RequestError, StorageError
from rlhf_ray.storage import OutputFile

Make = Callable[[Path], object]


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


OCCUPIED: dict[str, tuple[Make, str]] = {
    "a directory": (lambda path: path.mkdir(), "is a directory: name a file in it"),
    "a pipe": (os.mkfifo, "is a pipe, .* or /dev/stdout"),
    "a socket": (make_socket, "is a socket"),
    "a device": (lambda path: os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5)), "is a device"),
    "a disk": (lambda path: os.mknod(path, stat.S_IFBLK | 0o666, os.makedev(7, 250)), "is a device"),
    "a link to a file": (
        lambda path: path.symlink_to(path.parent / "mine"),
        "is a link to .*mine, which is not followed",
    ),
    "a link to nothing": (lambda path: path.symlink_to("nowhere"), "is a link to nowhere"),
    "a link to a device": (lambda path: path.symlink_to("/dev/null"), "is a link to /dev/null"),
    "a file of somebody else": (
        lambda path: (path.write_text("x"), os.chown(path, 12345, -1)),
        "belongs to user 12345",
    ),
    "a read-only file": (lambda path: (path.write_text("x"), path.chmod(0o444)), "is read-only"),
}


@pytest.mark.skipif(os.geteuid() != 0, reason="makes devices and files of others")
@pytest.mark.parametrize("occupied", OCCUPIED)
def test_what_is_no_file_of_this_user_is_refused_and_stays_as_it_is(tmp_path: Path, occupied: str) -> None:
    (tmp_path / "mine").write_text("mine")
    place = tmp_path / "out.json"
    make, message = OCCUPIED[occupied]
    make(place)
    before = place.lstat()
    for act in (lambda file: file.check(), lambda file: file.write("new")):
        with pytest.raises(RequestError, match=f"^--output {place}: {message}"):
            act(OutputFile(place, overwrite=True))
    assert place.lstat()[:8] == before[:8]
    assert (tmp_path / "mine").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["mine", "out.json"]


def test_a_file_is_written_over_only_where_the_user_allows_it(tmp_path: Path) -> None:
    place = tmp_path / "out.json"
    assert OutputFile(place).write("first ü").read_text() == "first ü"
    place.chmod(0o600)
    for act in (OutputFile(place).check, lambda: OutputFile(place).write("second")):
        with pytest.raises(RequestError, match="exists already: name another file, or write over it with --overwrite"):
            act()
    assert place.read_text() == "first ü"
    OutputFile(place, overwrite=True).write("second")
    assert place.read_text() == "second"
    assert stat.S_IMODE(place.stat().st_mode) == 0o600, "who may read it stays as it was"
    assert os.listdir(tmp_path) == ["out.json"]


def test_a_file_made_after_the_check_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = OutputFile(tmp_path / "out.json")
    file.check()
    file.path.write_text("theirs")
    monkeypatch.setattr(OutputFile, "check", lambda self: None)  # it came between check and rename
    with pytest.raises(StorageError, match="File exists"):
        file.write("mine")
    assert file.path.read_text() == "theirs"
    assert os.listdir(tmp_path) == ["out.json"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/folder.json", "the folder .*no does not exist: make it"),
        ("file/out.json", "the folder .*file does not exist"),
        ("x" * 300, "File name too long"),
        ("y/" * 3000, "File name too long"),
    ],
)
def test_a_place_that_cannot_be_is_refused_before_the_work(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RequestError, match=message):
        OutputFile(tmp_path / name).check()
    assert os.listdir(tmp_path) == ["file"]


def test_a_long_name_that_the_file_system_allows_is_written(tmp_path: Path) -> None:
    assert OutputFile(tmp_path / ("x" * 255)).write("all").read_text() == "all"


def test_a_stream_is_written_to(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    OutputFile(Path(f"/dev/fd/{writer}")).write("to a pipe")
    assert os.read(reader, 100) == b"to a pipe"
    with open(tmp_path / "log", "w") as log:
        log.write("before ")
        log.flush()
        OutputFile(Path(f"/proc/self/fd/{log.fileno()}")).write("after")
    assert (tmp_path / "log").read_text() == "before after", "what was written before is not lost"
    with pytest.raises(RequestError, match="this stream is read from"):
        OutputFile(Path(f"/dev/fd/{reader}")).check()
    os.close(reader)
    os.close(writer)
    with pytest.raises(RequestError, match="no such stream is open"):
        OutputFile(Path(f"/dev/fd/{writer}")).check()


def test_the_null_device_takes_it_and_stays(tmp_path: Path) -> None:
    before = os.stat("/dev/null")
    OutputFile(Path("/dev/null")).write("nothing")
    assert os.stat("/dev/null").st_ino == before.st_ino and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    with pytest.raises(StorageError, match="disk full: cannot write /dev/full"):
        OutputFile(Path("/dev/full")).write("nothing")


def test_a_file_is_named_by_what_it_holds_where_that_is_asked(tmp_path: Path) -> None:
    for name in ("q", "q.txt2", "q.jsonl.gz", "q.JSONL"):
        with pytest.raises(
            RequestError, match=rf"--output .*{name}: does not end in .jsonl, by which it is read: name it q.*jsonl"
        ):
            OutputFile(tmp_path / name, ending=".jsonl").check()
    OutputFile(tmp_path / "q.jsonl", ending=".jsonl").write("{}")
    OutputFile(Path("/dev/null"), ending=".jsonl").write("{}")
    assert [path.name for path in tmp_path.iterdir()] == ["q.jsonl"]
