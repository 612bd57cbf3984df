"""``python -m tests.gpu.rehearse [--folder FOLDER] [--python PYTHON]``: ``make gpu`` on the CPU of a machine like the bare one.

Always true: the environment holds the machine's own versions of its packages and nothing else, the wheels are those that
would be carried, and the command is that of ``make gpu``, with tiny sizes. What needs a CUDA kernel is left out. It takes
minutes and downloads gigabytes; ``make test`` rehearses the same with this environment's versions.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.gpu import bare_machine, carried, prepare

ROOT = Path(__file__).parents[2]

UNHURRIED = ("--minutes", "30", "--patience", "4")
"""A CPU that others use too may be slow, and nobody lends it by the minute."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the environment where it is missing, prepare the wheels, and run the checks; returns their exit code."""
    parser = argparse.ArgumentParser(prog="tests.gpu.rehearse", description="rehearse make gpu on a CPU")
    folder = ROOT / "build" / "gpu-machine"
    parser.add_argument("--folder", type=Path, default=folder, help=f"environment, kept (default: {folder})")
    parser.add_argument("--python", default=f"python{bare_machine.PYTHON}", help="what makes it (default: %(default)s)")
    parser.add_argument("--wheels", type=Path, default=carried.FOLDER, help="default: %(default)s")
    options = parser.parse_args(arguments)
    made = options.folder / "bin" / "python"
    if not made.exists():
        made = bare_machine.install_environment(options.folder, options.python)
    version = subprocess.check_output(
        [made, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"], text=True
    ).strip()
    prepare.main(["--python", version, "--folder", str(options.wheels)])
    results = options.folder / "gpu.json"
    for old in (results, results.with_suffix(".log")):
        old.unlink(missing_ok=True)
    command = [made, "-m", "tests.gpu.run", "--device", "cpu", "--start", "spawn", *UNHURRIED]
    return subprocess.run([*command, "--wheels", options.wheels, "--results", results], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
