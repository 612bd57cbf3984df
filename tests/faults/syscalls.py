"""Hold a thread before each of its file operations below a directory: to copy the files as they are then, or to let it fail.

The kernel hands the operations over (seccomp's user notification, Linux 5.5 and later) to a process of its own
(:mod:`tests.faults.supervisor`). Always true: whichever library makes a call (Python, torch's C++, the Rust of safetensors),
it passes here; calls of other threads, and of files elsewhere, do not notice.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NUMBERS: dict[str, dict[str, int]] = {
    "x86_64": {
        "read": 0, "write": 1, "open": 2, "pread64": 17, "pwrite64": 18, "writev": 20, "sendfile": 40, "fsync": 74,
        "fdatasync": 75, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85, "link": 86, "unlink": 87,
        "getdents64": 217, "openat": 257, "mkdirat": 258, "unlinkat": 263, "renameat": 264, "linkat": 265, "renameat2": 316,
        "copy_file_range": 326,
    },
    "aarch64": {
        "read": 63, "write": 64, "pread64": 67, "pwrite64": 68, "writev": 66, "sendfile": 71, "fsync": 82, "fdatasync": 83,
        "ftruncate": 46, "getdents64": 61, "openat": 56, "mkdirat": 34, "unlinkat": 35, "renameat": 38, "linkat": 37,
        "renameat2": 276, "copy_file_range": 285,
    },
}  # fmt: skip
"""The system calls that read or change files, by the kernel's table of each processor."""
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
SECCOMP = {"x86_64": 317, "aarch64": 277}
_ALLOW, _HAND_OVER = 0x7FFF0000, 0x7FC00000
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06


@dataclass(frozen=True)
class Order:
    """What happens to operations below ``root``."""

    root: str
    fail_at: int | None = None
    """The operation that fails, from 0; none fails where it is None."""
    errno: int = 0
    lasting: bool = False
    """Whether every later operation that ``errno`` is possible for fails too, as on a full disk."""
    states: str | None = None
    """Where the files are copied to, whenever they have changed before an operation, and at the end."""
    every: int = 1
    """Of these copies each so-many-th is made, and the last."""


@dataclass(frozen=True)
class Operation:
    """One call: its name, what it does (``read``, ``write``, ``make``, ``name``, ``remove`` or ``flush``), and its path."""

    call: str
    kind: str
    path: str


class FileOperations:
    """A thread whose file operations are watched; use it in a ``with`` block."""

    def __enter__(self) -> FileOperations:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.supervisor", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                cwd=Path(__file__).parents[2],
                env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
            )
        self._socket, self._lines = ours, ours.makefile("rw")
        ctypes.CDLL(None).prctl(0x59616D61, ctypes.c_ulong(-1))  # PR_SET_PTRACER: it reads the paths in our memory
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="watched")
        self._thread.submit(self._hand_over).result()
        return self

    def _hand_over(self) -> None:
        listener = hand_over_file_calls()
        socket.send_fds(self._socket, [b"\n"], [listener])
        os.close(listener)

    def __exit__(self, *error: object) -> None:
        self._thread.shutdown()
        self._lines.close()
        self._socket.close()
        self._process.wait(10)

    def run(self, action: Callable[[], Any], order: Order) -> tuple[list[Operation], BaseException | None]:
        """Do ``action`` in the watched thread; what it did below ``order.root``, and what it raised."""
        self._say({"order": asdict(order)})
        try:
            self._thread.submit(action).result()
            error = None
        except BaseException as raised:
            error = raised
        return [Operation(*one) for one in self._say({"order": None})], error

    def _say(self, message: dict[str, Any]) -> Any:
        print(json.dumps(message), file=self._lines, flush=True)
        return json.loads(self._lines.readline())


def possible() -> bool:
    """Whether this machine lets a process watch its own calls."""
    outcome: list[bool] = []

    def attempt() -> None:
        try:
            os.close(hand_over_file_calls(["fdatasync"]))
            outcome.append(True)
        except (OSError, KeyError):
            outcome.append(False)

    thread = threading.Thread(target=attempt)
    thread.start()
    thread.join()
    return outcome == [True]


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_ushort), ("yes", ctypes.c_ubyte), ("no", ctypes.c_ubyte), ("value", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.POINTER(_Instruction)))


def hand_over_file_calls(names: list[str] | None = None) -> int:
    """Have the kernel hand over these calls (None: all) of this thread and those that it starts; returns where to."""
    machine = platform.machine()
    numbers = [NUMBERS[machine][name] for name in names or NUMBERS[machine]]
    lines = [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, ARCHITECTURES[machine]), (_RETURN, 0, 0, _ALLOW), (_LOAD, 0, 0, 0)]
    lines += [(_EQUAL, len(numbers) - index, 0, number) for index, number in enumerate(numbers)]
    lines += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _HAND_OVER)]
    program = _Program(len(lines), (_Instruction * len(lines))(*[_Instruction(*line) for line in lines]))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, of this thread
    listener: int = libc.syscall(SECCOMP[machine], 1, 8, ctypes.byref(program))  # SET_MODE_FILTER, NEW_LISTENER
    if listener < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return listener
