"""Copies of a state in memory, the room for them, and the thread that writes them."""

from __future__ import annotations

import copyreg
import os
import pickle
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from deepspeed.runtime.zero.config import ZeroStageEnum
from torch import nn

from rlhf_ray.engine import shards
from rlhf_ray.engine.saving.copies import copied_state
from rlhf_ray.engine.saving.room import KEPT_FREE, V1, V2, Room, _control_groups, room_for, shortage
from rlhf_ray.engine.saving.writer import Background, behind
from rlhf_ray.engine.shards import Unwritten
from rlhf_ray.errors import RequestError, StorageError
from rlhf_ray.storage import manifest


class Scaler:
    """As that of fp16, which DeepSpeed keeps in a state."""

    def __init__(self) -> None:
        self.scale = 1024.0
        self.history = [1]


def test_a_copy_stays_what_the_state_was() -> None:
    flat, scaler = torch.arange(12.0), Scaler()
    weight = nn.Parameter(torch.ones(3))
    state = {
        "views": [flat[:4], (flat[4:8].view(2, 2), None)],
        "module": OrderedDict(weight=weight),
        "moments": {0: {"step": torch.tensor(5.0), "exp_avg": torch.full((2,), 7.0, dtype=torch.bfloat16)}},
        "scaler": scaler,
        "shapes": OrderedDict(weight=weight.shape),
        "steps": 3,
    }
    kept = copied_state(state)
    with torch.no_grad():
        flat.zero_(), weight.zero_(), state["moments"][0]["exp_avg"].zero_(), state["moments"][0]["step"].add_(1)  # type: ignore[index]
    scaler.scale, state["steps"] = 1.0, 4
    scaler.history.append(2)
    first, (second, nothing) = kept["views"]
    assert first.tolist() == [0, 1, 2, 3] and second.tolist() == [[4, 5], [6, 7]] and nothing is None
    assert type(kept["module"]) is OrderedDict and type(kept["module"]["weight"]) is nn.Parameter
    assert kept["module"]["weight"].tolist() == [1, 1, 1] and kept["module"]["weight"].requires_grad
    assert kept["moments"][0]["exp_avg"].tolist() == [7, 7] and kept["moments"][0]["exp_avg"].dtype is torch.bfloat16
    assert kept["moments"][0]["step"] == 5 and kept["steps"] == 3 and kept["shapes"]["weight"] == weight.shape
    assert (kept["scaler"].scale, kept["scaler"].history) == (1024.0, [1])


def test_a_copy_holds_each_tensor_once_and_of_a_view_what_it_shows() -> None:
    flat = torch.arange(1000.0)
    tied = nn.Embedding(5, 3)
    state = {
        "view": flat[:10],
        "embed": tied.weight.detach(),
        "head": tied.weight.detach(),
        "again": tied.weight.detach()[:2],
    }
    kept = copied_state(state)
    assert kept["view"].untyped_storage().nbytes() == 40
    assert kept["embed"] is kept["head"] and kept["embed"].equal(tied.weight)
    assert kept["again"].equal(tied.weight[:2]) and kept["again"].shape == (2, 3)


def test_ranks_of_one_machine_share_what_is_free_of_it() -> None:
    assert shortage([Room("a", 600, 1000), Room("b", 600, 1000)]) is None
    assert shortage([Room("a", 500, 1000), Room("a", 500, 1000)]) is None
    assert shortage([Room("b", 1, 9), Room("a", 600_000, 1_000_000), Room("a", 600_000, 1_000_000)]) == (
        "1.2 MB on a, where 1.0 MB are free"
    )
    assert shortage([Room("a", 1000, -5)]) == "1 kB on a, where 0 kB are free"


def test_a_part_of_the_memory_stays_free() -> None:
    memory = psutil.virtual_memory()
    room = room_for(7)
    assert room.needed == 7 and room.free < memory.available + 2e9 - KEPT_FREE * memory.total


@pytest.mark.parametrize(
    ("own", "place", "files"),
    [
        ("0::/\n", "", V2),
        ("0::/job/step\n", "job/step", V2),
        ("0::/job/step\n", "job", V2),
        ("0::/outside/this/container\n", "", V2),
        ("4:memory:/job/step\n0::/\n", "memory/job/step", V1),
        ("4:cpu,memory:/job/step\n", "memory/job", V1),
        ("4:memory:/docker/of-the-host\n", "memory", V1),
    ],
)
def test_the_limit_of_each_control_group_around_this_process_counts(
    tmp_path: Path, own: str, place: str, files: tuple[str, str, str]
) -> None:
    maximum, current, cache = files
    (tmp_path / "own").write_text(own)
    assert [*_control_groups(tmp_path, tmp_path / "own")] == []
    group = tmp_path / place
    group.mkdir(parents=True, exist_ok=True)
    for name, text in ((maximum, "1000\n"), (current, "800\n"), ("memory.stat", f"anon 1\n{cache} 300\n")):
        (group / name).write_text(text)
    assert [*_control_groups(tmp_path, tmp_path / "own")] == [(1000, 500)]
    (group / maximum).write_text("max\n")
    assert [*_control_groups(tmp_path, tmp_path / "own")] == []


def test_a_thread_works_behind_this_one_and_its_error_comes_out_each_time() -> None:
    go, priorities = threading.Event(), list[int]()

    def fail() -> None:
        go.wait(10)
        priorities.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        raise StorageError("no space is left")

    before = os.getpriority(os.PRIO_PROCESS, 0)
    work = Background(fail, "test")
    assert not work.ended
    go.set()
    for _ in range(2):
        with pytest.raises(StorageError, match="no space"):
            work.result()
    assert work.ended and priorities == [behind(before)] and os.getpriority(os.PRIO_PROCESS, 0) == before
    assert (behind(0), behind(15)) == (10, 19)
    done: Callable[[], int] = Background(lambda: 5, "test").result
    assert (done(), done()) == (5, 5)


def test_what_the_work_takes_of_a_processor_is_known_and_waiting_is_none_of_it() -> None:
    def work() -> None:
        time.sleep(0.2)
        while time.thread_time() < 0.05:
            pass

    wrote = Background(work, "test")
    wrote.result()
    assert 0.05 <= wrote.seconds < 0.2


def test_files_are_hashed_in_the_thread_that_wrote_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads, record = set[int](), manifest._record

    def here(path: Path) -> manifest.FileRecord:
        threads.add(threading.get_ident())
        return record(path)

    monkeypatch.setattr(manifest, "_record", here)
    files = {tmp_path / name: partial(writes, tmp_path / name) for name in "ab"}
    written = Unwritten(tmp_path, files, []).write()
    assert threads == {threading.get_ident()}
    threads.clear()
    assert manifest.hash_files(tmp_path) == written
    assert threading.get_ident() not in threads, "several others hash what is not written beside training"


def writes(path: Path) -> None:
    path.write_text(f"the shard {path.name}")


@pytest.mark.parametrize("name", ["lr[1]", "best?", "*"])
def test_a_folder_that_deepspeed_takes_for_a_pattern_is_refused_by_name(name: str, tmp_path: Path) -> None:
    """``findings/deepspeed_loads_a_neighbour_of_the_folder.sh``: it would read what lies in another one."""
    with pytest.raises(RequestError, match="Rename the folder, and resume with its new name") as refused:
        shards.load(None, tmp_path / name / "checkpoints" / "3", {}, {}, "", tmp_path)
    assert name in str(refused.value)


def test_what_deepspeed_says_of_its_stage_is_written_by_value_whatever_python_does() -> None:
    """A call of ``getattr`` in a file would be refused when it is read."""
    written = pickle.dumps({"stage": ZeroStageEnum.gradients}, protocol=2)
    assert b"getattr" not in written and b"ZeroStageEnum" in written
    assert pickle.loads(written) == {"stage": ZeroStageEnum.gradients}
    assert copyreg.dispatch_table[ZeroStageEnum](ZeroStageEnum.weights) == (ZeroStageEnum, (3,))
