"""An error of the system says what is full or refused and where, whichever library met it; other errors stay what they are."""

from __future__ import annotations

import errno
import os
import pickle
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models

from rlhf_ray.errors import EXIT_FAILED, EXIT_WRONG_REQUEST, DiskFullError, ModelLoadError, RequestError, StorageError
from rlhf_ray.storage import JsonLines, storage_errors, write_file
from rlhf_ray.storage.failures import reason_of, translate

BIG, SMALL = torch.zeros(2_000_000), torch.zeros(10)
WRITERS: dict[str, Callable[[Path], object]] = {
    "torch": lambda path: torch.save({"a": BIG}, path),
    "torch, to a stream": lambda path: _to_stream(path),
    "torch, the old format": lambda path: torch.save({"a": BIG}, path, _use_new_zipfile_serialization=False),
    "torch, a small file": lambda path: torch.save({"a": SMALL}, path),
    "safetensors": lambda path: save_file({"a": BIG}, path),
    "tokenizers": lambda path: Tokenizer(models.WordLevel({str(n): n for n in range(9000)}, "0")).save(str(path)),
    "plain": lambda path: path.write_bytes(bytes(4_000_000)),
    "lines": lambda path: JsonLines(path).append({"text": "a" * 4_000_000}),
    "a whole file": lambda path: write_file(path, bytes(4_000_000)),
}


def _to_stream(path: Path) -> None:
    with path.open("wb") as stream:
        torch.save({"a": BIG}, stream)


def fill(disk: Path) -> None:
    with pytest.raises(OSError, match="No space"), (disk / "others").open("wb", buffering=0) as stream:
        while stream.write(bytes(65536)):
            pass


def failure(path: Path, writer: Callable[[Path], object], needed: int | None = None) -> StorageError:
    def write() -> None:
        with storage_errors(path, needed=needed):
            writer(path)

    error = _raised(write)
    assert isinstance(error, StorageError), f"{error!r} is of no use"
    return error


@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_is_called_so_whoever_writes(name: str, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(1000)
    if name in ("torch, a small file", "tokenizers"):
        fill(disk)
    error = failure(disk / "out", WRITERS[name], needed=8_000_000)
    assert isinstance(error, DiskFullError) and error.exit_code == EXIT_FAILED
    assert str(error).startswith(f"disk full: cannot write {disk}/"), error
    if not name.startswith(("lines", "a whole")):  # these say no size
        free = r"\d+ kB|1.0 MB" if name == "safetensors" else "0 kB"  # it has removed its half file by now
        room = rf"no space is left \(about 8.0 MB are needed, ({free}) of 1.0 MB are free at {disk}\)"
        assert re.search(room, str(error)), error
    assert type(pickle.loads(pickle.dumps(error))) is DiskFullError, "it reaches the driver as it is"


@pytest.mark.parametrize("name", ["torch", "torch, to a stream", "safetensors", "plain"])
def test_a_file_system_that_only_reads_is_called_so(name: str, small_disk: Callable[[int], Path]) -> None:
    disk = small_disk(1000)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    error = failure(disk / "out", WRITERS[name])
    assert error.exit_code == EXIT_WRONG_REQUEST and not isinstance(error, DiskFullError)
    assert str(error).startswith(f"cannot write {disk / 'out'}: Read-only file system. Make it writable")


@contextmanager
def limited(limit: int, most: int) -> Iterator[None]:
    before = resource.getrlimit(limit)
    resource.setrlimit(limit, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(limit, before)


@pytest.mark.parametrize("name", ["torch", "torch, to a stream", "torch, the old format", "safetensors", "plain"])
def test_a_limit_on_the_size_of_files_is_called_so(name: str, tmp_path: Path) -> None:
    with limited(resource.RLIMIT_FSIZE, 3_000_000):
        error = failure(tmp_path / "out", WRITERS[name])
    assert f"cannot write {tmp_path / 'out'}: no file may be larger than 3.0 MB here: raise" in str(error)


@pytest.mark.parametrize("name", ["torch, a small file", "safetensors", "plain"])
def test_too_many_open_files_are_called_so(name: str, tmp_path: Path) -> None:
    with limited(resource.RLIMIT_NOFILE, max(map(int, os.listdir("/proc/self/fd")))):
        held = []
        with pytest.raises(OSError, match="Too many"):
            while True:
                held.append(os.open(os.devnull, os.O_RDONLY))
        error = translate(_raised(lambda: WRITERS[name](tmp_path / "out")), tmp_path / "out")
        for descriptor in held:
            os.close(descriptor)
    assert error is not None and "Too many open files, this process may have" in str(error)
    assert "raise the limit (ulimit -n)" in str(error)


def _raised(action: Callable[[], object]) -> Exception:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError("nothing was raised")


def test_a_quota_that_torch_does_not_name_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "fsync", fsync)
    hidden = RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")
    error = translate(hidden, tmp_path / "step" / ".pending-step-000004-0123456789abcdef" / "policy")
    assert isinstance(error, DiskFullError)
    assert f"disk full: cannot write {tmp_path}/step/step-000004/policy: the disk quota is used up" in str(error)


def test_what_torch_could_not_write_for_no_known_reason_is_said_in_its_words(tmp_path: Path) -> None:
    error = translate(RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1 vs 2"), tmp_path)
    assert str(error).startswith(f"cannot use {tmp_path}: Input/output error (") and "unexpected pos 1 vs 2" in str(
        error
    )
    assert os.listdir(tmp_path) == []


def test_a_reason_for_reading_is_not_said_of_writing(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"cannot read .*rows: Permission denied. Make it readable"):  # noqa: SIM117
        with storage_errors(tmp_path, "read"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path / "rows"))


@pytest.mark.parametrize(
    "error",
    [ValueError("wrong"), RuntimeError("mat1 and mat2 shapes cannot be multiplied"), KeyError("a"), MemoryError()],
)
def test_an_error_of_another_kind_stays_what_it_is(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)) as caught, storage_errors(tmp_path):
        raise error
    assert caught.value is error and reason_of(error) is None


@pytest.mark.parametrize("error", [ModelLoadError("No space left on device"), RequestError("Permission denied")])
def test_an_error_of_this_project_stays_what_it_is(error: RequestError, tmp_path: Path) -> None:
    with pytest.raises(RequestError) as caught, storage_errors(tmp_path):
        raise error
    assert caught.value is error
