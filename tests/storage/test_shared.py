"""A directory of the same name on another disk is told apart from the one that the driver wrote to."""

from __future__ import annotations

import threading
import time
from pathlib import Path

from rlhf_ray.storage.jsonl import JsonLines
from rlhf_ray.storage.shared import SharedFile


def test_a_file_that_has_grown_is_the_same_and_one_of_another_disk_is_not(tmp_path: Path) -> None:
    here, there = JsonLines(tmp_path / "here"), JsonLines(tmp_path / "there")
    here.append({"attempt": 1, "timestamp": 1.25})
    there.append({"attempt": 1, "timestamp": 1.5})
    file = SharedFile.at(here.path)
    here.append({"attempt": 2})
    assert file.is_seen(within_s=0)
    here.path.unlink()
    assert not file.is_seen(within_s=0)
    there.path.rename(here.path)
    assert not file.is_seen(within_s=0)
    here.path.write_bytes(b"\xff")
    assert not file.is_seen(within_s=0)


def test_a_file_may_take_a_moment_to_appear(tmp_path: Path) -> None:
    path = tmp_path / "attempts"
    path.write_text("1")
    file = SharedFile.at(path)
    path.unlink()
    threading.Timer(0.3, path.write_text, ["1"]).start()
    began = time.monotonic()
    assert file.is_seen(within_s=20)
    assert time.monotonic() - began < 10
