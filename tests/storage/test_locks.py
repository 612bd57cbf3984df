"""One process has a file at a time, and asking who has it takes it from nobody."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

from rlhf_ray import storage
from rlhf_ray.storage.locks import is_taken, take, this_process

TAKE = "import os, sys; from rlhf_ray.storage.locks import take; print(take(os.open(sys.argv[1], os.O_RDWR)))"


def test_one_has_it_and_its_end_gives_it_back(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    assert not is_taken(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    assert not is_taken(path)
    assert take(descriptor)
    assert is_taken(path)
    environment = {**os.environ, "PYTHONPATH": str(Path(storage.__file__).parents[2])}
    other = subprocess.run([sys.executable, "-c", TAKE, str(path)], capture_output=True, env=environment, check=True)
    assert other.stdout == b"False\n"
    os.close(descriptor)
    assert not is_taken(path)
    assert str(os.getpid()) in this_process()


def test_whoever_asks_in_a_loop_keeps_nobody_from_owning_it(tmp_path: Path) -> None:
    path, stop = tmp_path / "lock", threading.Event()
    path.touch()
    asked = [0]

    def ask() -> None:
        while not stop.is_set():
            is_taken(path)
            asked[0] += 1

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    refused = 0
    for _ in range(2000):
        descriptor = os.open(path, os.O_RDWR)
        refused += not take(descriptor)
        os.close(descriptor)
    stop.set()
    for thread in threads:
        thread.join()
    assert asked[0] > 100
    assert refused == 0
