"""What tests of several rooms share."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from types import FrameType, ModuleType
from typing import Any

import pytest

KILLED = 77
MANY_LINES = 5000

CrashEverywhere = Callable[[Callable[[], Any], Callable[[], Any], Sequence[ModuleType]], list[Any]]


@pytest.fixture
def crash_everywhere(monkeypatch: pytest.MonkeyPatch) -> CrashEverywhere:
    """Run an action again and again in a child that dies at the first line of some modules, the second, and so on.

    ``crash_everywhere(action, observe, modules)`` returns what ``observe`` saw after each death, and at last after the
    run that ended by itself. A killed process loses nothing that it wrote, synced or not: syncing is left out here.
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)

    def crash(action: Callable[[], Any], observe: Callable[[], Any], modules: Sequence[ModuleType]) -> list[Any]:
        files = {str(module.__file__) for module in modules}
        seen = []
        for count in range(1, MANY_LINES):
            died = _run_until_line(count, action, files)
            seen.append(observe())
            if not died:
                return seen
        raise AssertionError(f"the action has more than {MANY_LINES} lines")

    return crash


def _run_until_line(count: int, action: Callable[[], Any], files: set[str]) -> bool:
    pid = os.fork()
    if pid == 0:
        left = count

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal left
            if frame.f_code.co_filename not in files:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os._exit(KILLED)
            return trace

        sys.settrace(trace)
        try:
            action()
        except BaseException:
            sys.settrace(None)
            sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, KILLED), f"the action failed at line {count} with exit code {code}"
    return code == KILLED
