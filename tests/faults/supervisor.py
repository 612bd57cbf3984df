"""The process that answers the kernel for :class:`tests.faults.syscalls.FileOperations`.

Always true: it holds the caller while it looks, so that what it copies is what a kill at that moment leaves; a call that it
lets fail has done nothing; whatever it does not know, it lets pass.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import pickle
import platform
import select
import shutil
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.faults.power_cut import Unsynced, inodes
from tests.faults.syscalls import NUMBERS, Order

RECEIVE, SEND = 0xC0502100, 0xC0182101
NOTICE = struct.Struct("QIIiIQ6Q")
ANSWER = struct.Struct("QqiI")
HERE = -100 & 0xFFFFFFFF
PAGE = os.sysconf("SC_PAGESIZE")
KINDS = {
    "read": "read", "pread64": "read", "getdents64": "read", "write": "write", "pwrite64": "write", "writev": "write",
    "sendfile": "write", "copy_file_range": "write", "ftruncate": "write", "fsync": "flush", "fdatasync": "flush",
    "rename": "name", "renameat": "name", "renameat2": "name", "link": "name", "linkat": "name", "mkdir": "make",
    "mkdirat": "make", "creat": "make", "rmdir": "remove", "unlink": "remove", "unlinkat": "remove",
}  # fmt: skip
POSSIBLE = {
    errno.ENOSPC: {"write", "make", "name", "flush"},
    errno.EROFS: {"write", "make", "name", "remove"},
    errno.EIO: {"read", "write", "make", "name", "remove", "flush"},
}
"""Which kinds of operations meet which error."""
_OPEN_WRITES, _SWAP, _REMOVE_DIRECTORY = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC, 2, 0x200


class Call:
    """A call that the kernel holds."""

    def __init__(self, raw: bytes) -> None:
        self.id, self.thread, _, number, _, _, *arguments = NOTICE.unpack(raw[: NOTICE.size])
        self.arguments = [int(one) for one in arguments]
        self.name = {number: name for name, number in NUMBERS[platform.machine()].items()}[number]

    def path(self, argument: int, directory: int | None = None) -> str:
        """The absolute path that an argument points to, below what the argument ``directory`` opens."""
        place = self.arguments[argument]
        with open(f"/proc/{self.thread}/mem", "rb", buffering=0) as memory:
            memory.seek(place)
            raw = memory.read(PAGE - place % PAGE)  # what follows may not be there
            while b"\0" not in raw:
                raw += memory.read(PAGE)
        text = os.fsdecode(raw.split(b"\0", 1)[0])
        opened = None if directory is None else self.arguments[directory] & 0xFFFFFFFF
        base = os.readlink(f"/proc/{self.thread}/cwd") if opened in (None, HERE) else self.opened(opened or 0)
        return os.path.normpath(os.path.join(base, text))

    def opened(self, descriptor: int) -> str:
        """The path of an open file."""
        return os.readlink(f"/proc/{self.thread}/fd/{descriptor}")

    def describe(self) -> tuple[str, list[str]]:
        """What it does, and its paths, the one that it changes last."""
        name, given = self.name, self.arguments
        if name in ("open", "openat", "creat"):
            first = int(name == "openat")
            flags = os.O_CREAT | os.O_TRUNC if name == "creat" else given[first + 1]
            return "make" if flags & _OPEN_WRITES else "read", [self.path(first, 0 if first else None)]
        if name in ("rename", "link"):
            return "name", [self.path(0), self.path(1)]
        if name in ("renameat", "renameat2", "linkat"):
            return "name", [self.path(1, 0), self.path(3, 2)]
        if name in ("mkdir", "rmdir", "unlink"):
            return KINDS[name], [self.path(0)]
        if name in ("mkdirat", "unlinkat"):
            return KINDS[name], [self.path(1, 0)]
        return KINDS[name], [self.opened(given[2 if name == "copy_file_range" else 0])]


class Supervisor:
    """Follows the operations of one order after the other."""

    def __init__(self, control: socket.socket) -> None:
        self.control = control
        self.listener = socket.recv_fds(control, 1, 1)[1][0]
        self.order: Order | None = None
        self._begin(None)

    def _begin(self, order: Order | None) -> None:
        self.order, self.operations, self.unsynced = order, list[tuple[str, str, str]](), Unsynced()
        self.after: list[Callable[[], None]] = []
        self.states, self.last = 0, None

    def serve(self) -> None:
        """Answer until the other side has ended."""
        waiting = select.poll()
        waiting.register(self.control, select.POLLIN)
        waiting.register(self.listener, select.POLLIN)
        while True:
            for ready, event in waiting.poll():
                if ready == self.listener:
                    if not event & select.POLLIN:
                        waiting.unregister(self.listener)  # no watched thread is left
                    else:
                        self._answer()
                elif not self._obey():
                    return

    def _obey(self) -> bool:
        line = b""
        while not line.endswith(b"\n"):
            part = self.control.recv(1)
            if not part:
                return False
            line += part
        self._settle()
        if self.order is not None and self.order.states is not None:
            self._keep_state("the end", last=True)
        done = self.operations
        order = json.loads(line)["order"]
        self._begin(None if order is None else Order(**order))
        self.control.sendall(json.dumps(done).encode() + b"\n")
        return True

    def _answer(self) -> None:
        notice = bytearray(80)
        try:
            fcntl.ioctl(self.listener, RECEIVE, notice)
        except OSError:  # the caller has ended
            return
        call = Call(bytes(notice))
        try:
            code = self._judge(call)
        except OSError:
            code = 0
        passes = ANSWER.pack(call.id, 0, 0, 1) if code == 0 else ANSWER.pack(call.id, 0, -code, 0)
        try:
            fcntl.ioctl(self.listener, SEND, bytearray(passes))
        except OSError:
            return

    def _judge(self, call: Call) -> int:
        """The error of a call, 0 where it passes."""
        if self.order is None:
            return 0
        kind, paths = call.describe()
        root = self.order.root
        if not (paths[-1] == root or paths[-1].startswith(f"{root}/")):
            return 0
        number = len(self.operations)
        self.operations.append((call.name, kind, os.path.relpath(paths[-1], root)))
        self._settle()
        if self.order.states is not None:
            if kind != "read":
                self._keep_state(f"{call.name} {self.operations[-1][2]}")
                self._follow(call, kind, paths)
            return 0
        at, code = self.order.fail_at, self.order.errno
        met = at is not None and (number == at or (number > at and self.order.lasting))
        return code if met and kind in POSSIBLE[code] else 0

    def _settle(self) -> None:
        """What follows of calls that have been made by now."""
        after, self.after = self.after, []
        for effect in after:
            effect()

    def _keep_state(self, before: str, *, last: bool = False) -> None:
        """Copy the files, and what of them is not flushed, unless nothing has changed; always the ``last`` one."""
        assert self.order is not None and self.order.states is not None
        root, now = Path(self.order.root), self._look()
        if now == self.last and not last:
            return
        self.last, number = now, self.states
        self.states += 1
        if number % self.order.every and not last:
            return
        place = Path(self.order.states) / f"{number:04d}"
        place.mkdir(parents=True)
        shutil.copytree(root, place / "files", symlinks=True)
        (place / "about").write_bytes(pickle.dumps((before, inodes(root), self.unsynced)))

    def _look(self) -> Any:
        assert self.order is not None
        root = Path(self.order.root)
        stats = {path: os.lstat(root / path) for path in inodes(root).values()}
        files = sorted((path, one.st_ino, one.st_size, one.st_mtime_ns) for path, one in stats.items())
        return files, sorted(self.unsynced.content), [vars(change) for change in self.unsynced.changes]

    def _follow(self, call: Call, kind: str, paths: list[str]) -> None:
        """Note what the call changes and what it flushes."""
        path, unsynced = paths[-1], self.unsynced
        if kind == "flush":
            inode = os.stat(path).st_ino
            self.after.append(lambda: unsynced.flushed(inode))
        elif kind == "write":
            unsynced.written(path)
        elif kind == "make":
            if not os.path.lexists(path):
                self.after.append(lambda: unsynced.made(path) if os.path.lexists(path) else None)
            elif os.path.isfile(path):
                unsynced.written(path)
        elif call.name.startswith("rename"):
            swaps = call.name == "renameat2" and call.arguments[4] & _SWAP
            (unsynced.swapped if swaps else unsynced.renamed)(*paths)
            change, before = unsynced.changes[-1], os.lstat(paths[0]).st_ino
            self.after.append(lambda: None if _is_inode(path, before) else unsynced.take_back(change))
        elif kind == "name":
            self.after.append(lambda: unsynced.made(path, linked=True) if os.path.lexists(path) else None)
        elif call.name == "rmdir" or (call.name == "unlinkat" and call.arguments[2] & _REMOVE_DIRECTORY):
            unsynced.emptied(path)
        elif os.path.isfile(path):
            unsynced.removed(path)


def _is_inode(path: str, inode: int) -> bool:
    return os.path.lexists(path) and os.lstat(path).st_ino == inode


if __name__ == "__main__":
    Supervisor(socket.socket(fileno=int(sys.argv[1]))).serve()
