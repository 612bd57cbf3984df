"""The command line as a user has it: a process of its own, in a directory of its own."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Done:
    """How a command ended; ``seconds`` is the processor's time, which other work on the machine does not change."""

    code: int
    out: str
    err: str
    seconds: float


CommandLine = Callable[..., Done]


@pytest.fixture
def command_line(tmp_path: Path) -> CommandLine:
    """Run ``python -m rlhf_ray`` with these arguments in ``tmp_path``."""

    def run(*arguments: str, **variables: str) -> Done:
        python_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "rlhf_ray", *arguments],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": python_path, **variables},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return Done(done.returncode, done.stdout, done.stderr, seconds)

    return run
