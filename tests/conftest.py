"""What tests of several rooms share."""

from __future__ import annotations

import gc
import io
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import hypothesis
import jaxtyping
import pytest

from rlhf_ray.environment import HUB_SWITCHES

CHECKED_ROOMS = (
    "rlhf_ray.algorithms",
    "rlhf_ray.evaluation.baseline",
    "rlhf_ray.trajectories.packing",
)
"""Where calls are checked against their annotations: types, dtypes and shapes of arguments and results.

``trajectories.batch`` is not among them: a batch checks itself at every turn, and checking it twice costs seconds. Nor is
``models.forward``, which runs for every layer of every pack: ``tests/models/conftest.py`` checks it in the tests of models.
"""
TESTS_WITH_CHECKS = ("algorithms", "evaluation", "models", "trajectories", "test_shape_checks.py")
"""Whose tests are checked. In the others, which train whole models, every call would cost a third of the time."""
jaxtyping.install_import_hook(CHECKED_ROOMS, "beartype.beartype")  # before anything imports these rooms
jaxtyping.config.update("jaxtyping_disable", True)  # until a test of these begins

CrashEverywhere = Callable[[Path, Callable[[], Any], Callable[[], Any], Sequence[ModuleType]], list[Any]]
ENGINE_MODULE = "vllm.v1.engine.llm_engine"

# No test asks a hub or writes into the user's cache; the libraries read this when they are imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # no test computes on a GPU that the machine may have
os.environ.setdefault("HF_DATASETS_CACHE", os.path.join(tempfile.gettempdir(), f"rlhf_ray-tests-{os.getuid()}"))

os.environ.setdefault(
    "RAY_ENABLE_AUTO_CONNECT", "0"
)  # what asks Ray for something without a connection fails, as in a run

hypothesis.settings.register_profile("no deadline", deadline=None)  # on a busy machine any example may take long
hypothesis.settings.load_profile("no deadline")

if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as under nohup; children would ignore it too, but not a handler
    signal.signal(signal.SIGHUP, lambda number, frame: None)

gc.disable()  # while tests and what they test are imported; on again when all are collected


@pytest.fixture(scope="module", autouse=True)
def vllm_has_a_process_of_its_own(request: pytest.FixtureRequest) -> Iterator[None]:
    """vLLM takes over the threads, the compiler and the process group of the process that runs an engine: a module that does
    so is marked ``vllm``, and `make test` runs those after the end-to-end tests, which start processes of their own.
    """
    before = ENGINE_MODULE in sys.modules
    yield
    newly = ENGINE_MODULE in sys.modules and not before
    assert not newly or request.node.get_closest_marker("vllm"), "mark this module: pytestmark = pytest.mark.vllm"


@pytest.fixture(scope="module", autouse=True)
def ray_ends_with_the_module_that_starts_it() -> Iterator[None]:
    """Many calls of Ray start it unasked, and the next module that starts it in this process would fail in its place."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
        pytest.fail("this module leaves Ray running in the process of the tests", pytrace=False)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Modules that take long come first, so that the others fill the gaps; where everything runs in one process, vLLM last."""
    items.sort(key=lambda item: (item.get_closest_marker("vllm") is not None, item.get_closest_marker("early") is None))


def pytest_collection_finish() -> None:
    """What was imported stays, and is no garbage."""
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def no_test_lets_later_ones_ask_the_hub() -> Iterator[None]:
    """A job whose config names a hub id lets its process ask the hub, which here is the process of all tests."""
    before = {name: os.environ.get(name) for name in HUB_SWITCHES}
    yield
    for name, value in before.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


@pytest.fixture(scope="module", autouse=True)
def shapes_are_checked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check every call of :data:`CHECKED_ROOMS` against its annotations in the tests of :data:`TESTS_WITH_CHECKS`."""
    place = request.path.relative_to(Path(__file__).parent).parts[0]
    jaxtyping.config.update("jaxtyping_disable", place not in TESTS_WITH_CHECKS)
    yield
    jaxtyping.config.update("jaxtyping_disable", True)


@pytest.fixture
def outside_pytest(monkeypatch: pytest.MonkeyPatch) -> None:
    """No annotation is checked, as in a real run: for tests of what the package itself refuses."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def project_log() -> Iterator[io.StringIO]:
    """What the project's logger says, whoever set up logging or pytest's capture of it before."""
    from rlhf_ray.console import get_logger

    buffer = io.StringIO()
    handler = logging.StreamHandler(buffer)
    get_logger().addHandler(handler)
    yield buffer
    get_logger().removeHandler(handler)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mount a real disk of so many kB; for root alone."""
    disks: list[Path] = []

    def mount(kilobytes: int) -> Path:
        disk = tmp_path / f"disk-{len(disks)}"
        disk.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", disk], capture_output=True)
        if done.returncode != 0:
            pytest.skip(f"no disk can be mounted here: {done.stderr.decode().strip()}")
        disks.append(disk)
        return disk

    yield mount
    for disk in disks:
        subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write rows, or text or bytes as they are, into a file of this name."""

    def write_file(content: Iterable[Any] | str | bytes, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif isinstance(content, str):
            path.write_bytes(content.encode())
        else:
            path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def crash_everywhere(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> CrashEverywhere:
    """What a crash of an action at any line leaves behind, seen state by state.

    ``crash_everywhere(root, action, observe, modules)`` runs ``action`` once and copies the files below ``root`` whenever
    they have changed before a line of ``modules``: a process killed there leaves exactly these. Then it puts each state
    back and returns what ``observe`` saw in it, from the first to the one that the whole action left. Syncing is left
    out: a killed process loses nothing that it wrote.
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    copies = tmp_path_factory.mktemp("states")

    def crash(
        root: Path, action: Callable[[], Any], observe: Callable[[], Any], modules: Sequence[ModuleType]
    ) -> list[Any]:
        states: list[Path] = []
        last: object = None

        def keep_state() -> None:
            nonlocal last
            now = _fingerprint(root)
            if now != last:
                last = now
                states.append(copies / str(len(states)))
                shutil.copytree(root, states[-1], symlinks=True)

        with _before_each_line(modules, keep_state):
            action()
        keep_state()
        return [observe() for state in states if _put_back(state, root)]

    return crash


def _fingerprint(root: Path) -> list[tuple[str, int, int, int]]:
    entries = []
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        entries.append((str(path), status.st_ino, status.st_size, status.st_mtime_ns))
    return entries


def _put_back(state: Path, root: Path) -> bool:
    shutil.rmtree(root)
    shutil.copytree(state, root, symlinks=True)
    return True


@contextmanager
def _before_each_line(modules: Sequence[ModuleType], call: Callable[[], None]) -> Iterator[None]:
    files = {str(module.__file__) for module in modules}

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            call()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that starts a Ray of its own does so in a process of its own, which tests of the command leave out."""
    from rlhf_ray.launch import parent

    monkeypatch.setattr(parent, "with_own_ray", lambda config, arguments, work: work())
