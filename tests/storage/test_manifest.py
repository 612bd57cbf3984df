"""A directory that is verified holds exactly what was committed: every damage is found and named."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray import storage
from rlhf_ray.errors import IntegrityError, StorageError

FILES = {"a.safetensors": b"\x00\x01weights", "rank-0/optimizer.pt": b"state", "rank-1/optimizer.pt": b"STATE"}


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    pending = storage.begin_directory(tmp_path / "step")
    for name, content in FILES.items():
        (pending.path / name).parent.mkdir(exist_ok=True)
        (pending.path / name).write_bytes(content)
    storage.commit(pending, about={"step": 40, "note": "é", "learning_rate": 1e-5, "epochs": 1.0})
    return tmp_path / "step"


def test_the_manifest_says_size_and_hash_of_every_file(committed: Path) -> None:
    manifest = storage.verify(committed)
    assert {name: (record.size, record.sha256) for name, record in manifest.files.items()} == {
        name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in FILES.items()
    }
    assert manifest.about == {"step": 40, "note": "é", "learning_rate": 1e-5, "epochs": 1.0}
    on_disk = json.loads((committed / "manifest.json").read_text())
    assert on_disk["files"]["a.safetensors"]["size"] == len(FILES["a.safetensors"])


def test_any_single_flipped_bit_anywhere_is_found(committed: Path) -> None:
    for path in [path for path in committed.rglob("*") if path.is_file()]:
        original = path.read_bytes()
        for position in range(len(original)):
            flipped = bytearray(original)
            flipped[position] ^= 1 << position % 8
            path.write_bytes(flipped)
            with pytest.raises(IntegrityError, match=path.name):
                storage.verify(committed)
        path.write_bytes(original)
    storage.verify(committed)


def test_any_truncation_of_any_file_is_found(committed: Path) -> None:
    for path in [path for path in committed.rglob("*") if path.is_file()]:
        original = path.read_bytes()
        for length in range(len(original)):
            path.write_bytes(original[:length])
            with pytest.raises(IntegrityError, match=path.name):
                storage.verify(committed)
        path.write_bytes(original)


def test_each_kind_of_damage_is_named_with_its_file(committed: Path) -> None:
    (committed / "a.safetensors").write_bytes(b"short")
    (committed / "rank-0" / "optimizer.pt").write_bytes(b"stare")
    (committed / "rank-1" / "optimizer.pt").unlink()
    (committed / "stray.bin").write_bytes(b"")
    with pytest.raises(IntegrityError) as caught:
        storage.verify(committed)
    message = str(caught.value)
    assert "a.safetensors has 5 bytes instead of 9" in message
    assert "rank-0/optimizer.pt has different content (SHA-256 " in message
    assert "rank-1/optimizer.pt is missing" in message
    assert "stray.bin is not in the manifest" in message


def test_files_of_equal_size_that_changed_places_are_found(committed: Path) -> None:
    first, second = committed / "rank-0" / "optimizer.pt", committed / "rank-1" / "optimizer.pt"
    os.rename(first, committed / "third")
    os.rename(second, first)
    os.rename(committed / "third", second)
    with pytest.raises(IntegrityError, match=r"rank-0/optimizer\.pt has different content"):
        storage.verify(committed)


def test_a_directory_without_a_manifest_was_never_committed(committed: Path) -> None:
    (committed / "manifest.json").unlink()
    with pytest.raises(IntegrityError, match=r"manifest\.json is missing"):
        storage.verify(committed)


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b"null", b'{"files": 1, "about": {}}', b"\xff\xfe"])
def test_a_manifest_that_is_something_else_is_damage_and_not_a_crash(committed: Path, raw: bytes) -> None:
    (committed / "manifest.json").write_bytes(raw)
    with pytest.raises(IntegrityError, match=r"manifest\.json is damaged"):
        storage.verify(committed)


def test_a_rewritten_manifest_with_another_claim_is_found(committed: Path) -> None:
    """A change that leaves all hashes of files true: only the manifest's own checksum can tell."""
    path = committed / "manifest.json"
    path.write_bytes(path.read_bytes().replace(b'"step": 40', b'"step": 41'))
    with pytest.raises(IntegrityError, match="does not match its own checksum"):
        storage.verify(committed)


def test_a_link_is_refused_since_its_target_is_out_of_reach_of_the_manifest(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes(b"weights")
    pending = storage.begin_directory(tmp_path / "step")
    os.symlink(tmp_path / "elsewhere", pending.path / "weights")
    with pytest.raises(IntegrityError, match="weights is neither a file nor a directory"):
        storage.commit(pending)
    assert os.listdir(tmp_path) == ["elsewhere"]


def test_a_damaged_disk_is_not_a_missing_permission(committed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int) -> None:
        def file_digest(stream: object, name: str) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(hashlib, "file_digest", file_digest)

    refuse(5)  # EIO: the bytes are lost
    with pytest.raises(IntegrityError, match="cannot be read back"):
        storage.verify(committed)
    refuse(13)  # EACCES: the bytes may be fine
    with pytest.raises(StorageError, match=r"cannot read .*Make it readable"):
        storage.verify(committed)


def test_files_that_others_have_hashed_are_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pending = storage.begin_directory(tmp_path / "step")
    for name in ("rank-0", "rank-1", "driver"):
        (pending.path / name).write_text(name)
    hashed = storage.hash_files(pending.path, ["rank-0", "rank-1"])
    read, file_digest = list[str](), hashlib.file_digest

    def counted(stream: Any, name: str) -> Any:
        read.append(Path(stream.name).name)
        return file_digest(stream, name)

    monkeypatch.setattr(hashlib, "file_digest", counted)
    committed = storage.commit(pending, hashed=hashed)
    assert read == ["driver"] and sorted(committed.files) == ["driver", "rank-0", "rank-1"]
    read.clear()
    storage.amend(tmp_path / "step", {"driver": "another text"})
    assert read == ["driver"], "what stays as it was keeps its record"
    assert storage.verify(tmp_path / "step").files["rank-1"] == hashed["rank-1"]
    (tmp_path / "step" / "rank-1").write_text("rank-2")
    assert storage.verify(tmp_path / "step", contents=False).about == {}
    with pytest.raises(IntegrityError, match="rank-1 has different content"):
        storage.verify(tmp_path / "step")


def test_a_file_that_is_shorter_here_than_where_it_was_written_is_refused(tmp_path: Path) -> None:
    pending = storage.begin_directory(tmp_path / "step")
    (pending.path / "rank-0").write_bytes(b"all of it")
    hashed = storage.hash_files(pending.path)
    os.truncate(pending.path / "rank-0", 3)
    with pytest.raises(StorageError, match=r"rank-0 has 3 bytes here and 9 where it was written: .*shared file system"):
        storage.commit(pending, hashed=hashed)
    assert os.listdir(tmp_path) == []


names = st.text("ab-._", min_size=1, max_size=6).filter(lambda name: name.strip(".") and name != "manifest.json")


@given(files=st.dictionaries(names, st.binary(max_size=50), max_size=5), step=st.integers(0, 10**9))
@settings(max_examples=40, deadline=None)
def test_whatever_is_committed_is_verified_and_moves_with_its_directory(files: dict[str, bytes], step: int) -> None:
    with tempfile.TemporaryDirectory() as root:
        pending = storage.begin_directory(Path(root) / "step")
        for name, content in files.items():
            (pending.path / name).write_bytes(content)
        written = storage.commit(pending, about={"step": step})
        shutil.copytree(Path(root) / "step", Path(root) / "copy")
        assert storage.verify(Path(root) / "copy") == written == storage.read_manifest(Path(root) / "step")
        assert {name: record.size for name, record in written.files.items()} == {
            name: len(content) for name, content in files.items()
        }
