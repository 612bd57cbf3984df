#!/usr/bin/env bash
# torch 2.13.0: torch.save does not say that a disk is full, and "except OSError" does not see it.
#
# When the system refuses a write (no space, a quota, a file too large), Python's own write raises OSError with the number
# and the words of the reason. torch.save raises RuntimeError with a line about positions instead. Given a path, the reason
# is nowhere, neither in the error nor in those that it follows from. Given an open file, it is found in the error that the
# RuntimeError follows from. A loop that waits for space on OSError never gets to wait. The full disk is a limit on the size
# of files here. N and M stand for the numbers, which differ from one save to another.
#
# Seen on 2026-11-30 (the last lines of the output):
#   plain write: OSError: [Errno 27] File too large
#   torch.save, a path: RuntimeError: unexpected pos N vs M after RuntimeError: basic_ios::clear: iostream error
#   torch.save, an open file: RuntimeError: unexpected pos N vs M after OSError: [Errno 27] File too large
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
# The build for CPUs, which is small, where the index has it.
install torch==2.13.0+cpu 2> "$folder/log" || install torch==2.13.0
install numpy==2.3.5
cat > "$folder/try.py" <<'PY'
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

root = Path(sys.argv[1])
weights = {"weights": torch.zeros(100_000)}


def failure(write: Callable[[], object]) -> str:
    """The error of ``write``, which may not make a file as large as it needs, and the errors that this one follows from."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    error: BaseException | None = None
    try:
        write()
    except Exception as caught:
        error = caught
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    chain = []
    while error is not None:
        line = re.sub(r"\[enforce.*?\] \. ", "", str(error).splitlines()[0])
        chain.append(f"{type(error).__name__}: {re.sub(r'[0-9]+ vs [0-9]+', 'N vs M', line)}")
        error = error.__cause__ or error.__context__
    return " after ".join(chain) or "no error"


def save_opened() -> None:
    """Saves to a file that is already open."""
    with open(root / "opened.pt", "wb") as file:
        torch.save(weights, file)


cases = {
    "plain write": failure(lambda: (root / "plain").write_bytes(bytes(400_000))),
    "torch.save, a path": failure(lambda: torch.save(weights, root / "named.pt")),
    "torch.save, an open file": failure(save_opened),
}
expected = {
    "plain write": "OSError: [Errno 27] File too large",
    "torch.save, a path": "RuntimeError: unexpected pos N vs M after RuntimeError: basic_ios::clear: iostream error",
    "torch.save, an open file": "RuntimeError: unexpected pos N vs M after OSError: [Errno 27] File too large",
}
print("torch", torch.__version__)
for name, found in cases.items():
    print(f"{name}: {found}")
sys.exit(0 if cases == expected else "the behaviour has changed")
PY
"$folder/venv/bin/python" "$folder/try.py" "$folder"
