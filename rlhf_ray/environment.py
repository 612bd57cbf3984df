"""The environment variables that every process of a run starts with.

Invariants: usage reports of Ray and vLLM are off. No process contacts a model hub unless a config names a hub id.
``for_process`` only computes the variables; ``prepare`` sets them in this process, before heavy libraries are imported.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from rlhf_ray.errors import RequestError

Device = Literal["cpu", "cuda"]

HUB_SWITCHES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
"""With 1, Hugging Face's libraries use no network; they read it once, when they are imported."""

SAYS_EXIT_CODE = "RLHF_RAY_SAYS_EXIT_CODE"
"""Where it is set, a command ends its log with its exit code, which Ray does not keep of a job that was stopped."""
EXIT_CODE_LINE = "rlhf-ray: exit code "
"""How that line begins."""

RAY_WHEN_ASKED = {"RAY_ENABLE_AUTO_CONNECT": "0"}
"""For processes of ours that connect to Ray: most of its calls would start a cluster where the process has no connection, so a
thread that outlives the connection by a moment would leave one behind. In a user's own process that is the user's choice."""

SOCKET_BYTES = 107
"""The longest name of a Unix socket on Linux."""

ALLOCATOR = "PYTORCH_ALLOC_CONF"
ALLOCATOR_SETTINGS = "expandable_segments:True"
"""Packs differ in length, so blocks of many sizes come and go; segments that grow leave no holes between them.

Not for memory that other processes open over CUDA IPC, as the workers of an engine do with that of one another. Has not run on
a GPU yet.
"""

KERNEL_CACHES = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
KERNELS_KEPT = 512
"""How many compiled kernels oneDNN may keep.

It keeps one of a megabyte or more for each shape of a half-precision matrix product, by default a thousand. Packs differ in
length, so with the default a process would grow for hours. A pass over 50,000 tokens needs about 400 kernels.
"""

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Options of glibc's ``mallopt``: the free bytes above which a heap shrinks, the least bytes by which it grows, and the size
from which a block gets a mapping of its own. The numbers are those of ``malloc.h``."""
MEMORY_KEPT = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: (1 << 31) - 1, M_TOP_PAD: 64 << 20}
"""The largest values that glibc accepts for the first two; heaps grow by the size of a whole thread's heap."""


def for_process(
    *, threads: int = 1, hub: bool = False, device: Device | None = None, hands_memory_on: bool = False
) -> dict[str, str]:
    """The environment variables of one process.

    ``threads`` limits its compute threads and ``hub`` allows downloads. ``device`` is what it was placed on. None is for a
    process that starts others: it computes on the CPU what little it computes, and they may use every GPU that it sees.
    ``hands_memory_on`` says that others open its GPU memory over CUDA IPC. Of segments that grow they would need its file
    descriptors (``pidfd_getfd``), which Linux mostly allows to a process's own ancestors alone.
    """
    variables = {
        "RAY_USAGE_STATS_ENABLED": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        **dict.fromkeys(HUB_SWITCHES, "0" if hub else "1"),
        "TOKENIZERS_PARALLELISM": "false",
        "TRANSFORMERS_VERBOSITY": "error",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would inherit the threads of torch and Ray as they stand
        "VLLM_LOGGING_LEVEL": "ERROR",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }
    if device == "cuda":
        # What the user has set here goes on to the ranks.
        asked = os.environ.get(ALLOCATOR, "" if hands_memory_on else ALLOCATOR_SETTINGS)
        return variables | {"DS_ACCELERATOR": "cuda"} | ({ALLOCATOR: asked} if asked else {})
    variables |= {"DS_ACCELERATOR": "cpu", **dict.fromkeys(KERNEL_CACHES, str(KERNELS_KEPT))}
    if device == "cpu":
        variables |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "CUDA_VISIBLE_DEVICES": ""}
    return variables


def prepare(variables: Mapping[str, str] | None = None) -> None:
    """Set ``variables`` (default: ``for_process()``) in this process, except those that the user has set already."""
    for name, value in (for_process() if variables is None else variables).items():
        os.environ.setdefault(name, value)


def allow_hub() -> None:
    """Let this process ask the hub, as the ranks of a job do that names a hub id."""
    os.environ.update(dict.fromkeys(HUB_SWITCHES, "0"))


def require_room_for_sockets() -> None:
    """Refuse a directory for temporary files below which the names of Ray's sockets would be too long for the system."""
    name = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
    directory = "/tmp" if name is None else os.environ[name]
    longest = SOCKET_BYTES - len(f"/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store")
    if len(os.fsencode(directory)) > longest:
        raise RequestError(
            f"{name} {directory} has {len(os.fsencode(directory))} letters, but names of Ray's sockets below it may have "
            f"{SOCKET_BYTES} in all: set RAY_TMPDIR to a directory of {longest} letters at most, such as /tmp"
        )


def expand_home(path: str | Path) -> Path:
    """``path`` with the home directory in the place of a ``~`` or ``~user`` at its beginning.

    Raises :class:`RequestError` where there is no such user, or nobody knows this user's home.
    """
    expanded = os.path.expanduser(path)
    if str(expanded).startswith("~"):
        user = Path(expanded).parts[0].removeprefix("~")
        known = f"there is no user {user}" if user else f"no home directory is known for user {os.getuid()}: set HOME"
        raise RequestError(f"{path}: {known}, or write the path out (./~ for a name that begins with ~)")
    return Path(expanded)


def is_hub_id(name: str, directory: str | Path = "") -> bool:
    """Whether ``name`` has the form ``org/name`` and cannot be a path on this machine: ``directory`` holds no ``org``.

    A relative path is read from ``directory``, by default the current one.
    """
    parts = name.split("/")
    has_form = len(parts) == 2 and all(parts) and not name.startswith((".", "~"))
    return has_form and not os.path.isdir(os.path.join(directory, parts[0]))


def keep_freed_memory() -> None:
    """Keep freed memory in this process instead of giving it back to the system; has an effect with glibc only.

    A forward pass frees and allocates the same large blocks again and again. If the system takes their pages back, every
    page costs a fault when it is next used: in all a twentieth of a forward pass on CPU.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):  # other C libraries have no mallopt, or one without effect
        for option, value in MEMORY_KEPT.items():
            library.mallopt(option, value)


def return_freed_memory() -> None:
    """Give the memory that this process has freed back to the system; has an effect with glibc only.

    By itself glibc gives back what lies above the last block in use, so that one small block can keep hundreds of megabytes.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
