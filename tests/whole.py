"""``python -m tests.whole``: all that ``make test`` runs, on two cores; the exit code is 0 if it holds.

Invariants: the rooms run side by side, and then the whole stack and the engines of vLLM. A test that fails beside others is run
once more with the machine for itself, since on two busy cores a deadline may pass that holds anywhere else; if it fails again,
or if more than ``MOST`` failed, so does the whole. What passed only alone is named at the end: it is to be mended too.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
MOST = 3
"""More failures are not the machine's."""
SIDE_BY_SIDE = ("--dist", "loadfile", "--no-loadscope-reorder")
VLLM = "pytest.mark." + "vllm"
"""In two parts, so that no module names it that has no such test."""
FAILED = 1
"""pytest's exit code where tests ran and some failed."""
Run = Callable[[Sequence[str]], int]


def parts() -> list[list[str]]:
    """The arguments of pytest for each part."""
    modules = sorted((ROOT / "tests").rglob("test_*.py"))
    with_engines = [str(path.relative_to(ROOT)) for path in modules if VLLM in path.read_text(encoding="utf-8")]
    return [
        ["-n", "3", *SIDE_BY_SIDE, "-m", "not vllm and not long", "tests", "--ignore=tests/e2e"],
        ["-n", "2", *SIDE_BY_SIDE, "-m", "not long", "tests/e2e", *with_engines],
    ]


def run_part(arguments: Sequence[str], run: Run) -> tuple[int, list[str]]:
    """The exit code of a part, and the tests of it that passed only alone."""
    with tempfile.TemporaryDirectory() as cache:
        code = run([*arguments, "-o", f"cache_dir={cache}"])
        kept = Path(cache, "v", "cache", "lastfailed")
        failed = sorted(json.loads(kept.read_text(encoding="utf-8"))) if kept.is_file() else []
    if code != FAILED or not failed or len(failed) > MOST:
        return code, []
    print(f"\nonce more, alone: {', '.join(failed)}", flush=True)
    return run(failed), failed


def main(run: Run) -> int:
    """Run both parts; the second one only where the first one holds."""
    unstable: list[str] = []
    code = 0
    for arguments in parts():
        code, only_alone = run_part(arguments, run)
        if code:
            break
        unstable += only_alone
    if unstable:
        print("\nfailed beside others and passed alone, so that it is to be mended too:", *unstable, sep="\n  ")
    return code


def _pytest(arguments: Sequence[str]) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *arguments], cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(_pytest))
