"""What fails beside others, and only there, holds; what fails alone too, or in numbers, does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests import whole


class Pytest:
    """Stands in for pytest: so many tests fail beside others, and so many alone."""

    def __init__(self, beside: int, alone: int, code: int = 1) -> None:
        self.beside, self.alone, self.code = [f"test_it.py::test_{number}" for number in range(beside)], alone, code
        self.ran: list[list[str]] = []

    def __call__(self, arguments: Sequence[str]) -> int:
        self.ran.append(list(arguments))
        if "-n" not in arguments:
            return 1 if self.alone else 0
        kept = Path(
            next(word for word in arguments if word.startswith("cache_dir=")).partition("=")[2], "v/cache/lastfailed"
        )
        kept.parent.mkdir(parents=True)
        kept.write_text(json.dumps(dict.fromkeys(self.beside, True)))
        return self.code if self.beside else 0


@pytest.mark.parametrize(
    ("run", "code", "runs"),
    [
        (Pytest(0, 0), 0, 2),
        (Pytest(whole.MOST, 0), 0, 4),
        (Pytest(whole.MOST, 1), 1, 2),
        (Pytest(whole.MOST + 1, 0), 1, 1),
        (Pytest(1, 0, code=2), 2, 1),
    ],
    ids=["none", "beside others", "alone too", "too many", "interrupted"],
)
def test_what_failed_is_run_once_more_alone(
    run: Pytest, code: int, runs: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert whole.main(run) == code and len(run.ran) == runs
    assert all(arguments == run.beside for arguments in run.ran if "-n" not in arguments)
    told = capfd.readouterr().out
    assert ("is to be mended too" in told) == (runs == 4) and (runs != 4 or all(name in told for name in run.beside))


def test_what_passed_only_alone_is_named_where_the_second_part_fails(capfd: pytest.CaptureFixture[str]) -> None:
    beside = Pytest(1, 0)

    def run(arguments: Sequence[str]) -> int:
        return 2 if "tests/e2e" in arguments else beside(arguments)

    assert whole.main(run) == 2
    assert beside.beside[0] in capfd.readouterr().out.split("mended too")[1]


def test_pytest_says_what_failed(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import os\ndef test_a():\n    assert 'PYTEST_XDIST_WORKER' not in os.environ\n"
    )
    without = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}

    def run(arguments: Sequence[str]) -> int:
        command = [sys.executable, "-m", "pytest", "-q", *arguments]
        return subprocess.run(command, cwd=tmp_path, env=without, check=False).returncode

    assert whole.run_part(["-n", "1", "test_it.py"], run) == (0, ["test_it.py::test_a"])
