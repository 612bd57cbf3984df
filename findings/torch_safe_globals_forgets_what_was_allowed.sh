#!/usr/bin/env bash
# torch 2.13.0: leaving a block of safe_globals forbids its types, also where they were allowed before the block.
#
# torch.load reads only types that were allowed. add_safe_globals allows a type for the whole process, and the context manager
# torch.serialization.safe_globals for the time of a block. One expects a block to leave things as it found them. It does not:
# at its end the types that it named are taken out, whoever put them in. A library that wraps its own torch.load in a block
# thereby undoes what its caller allowed, for a block around it, for the process, and for a block of another thread, and the
# next torch.load of the same file raises UnpicklingError. The way out is to name in a block only what get_safe_globals()
# does not hold yet, and in threads to allow types once for the process, with no block.
#
# Seen on 2026-12-01 (the last lines of the output; each time the same file is loaded before, in and after an inner block):
#   in an outer block: loaded, loaded, UnpicklingError
#   allowed for the process: loaded, loaded, UnpicklingError
#   inner block in another thread: loaded, loaded, UnpicklingError
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
# The build for CPUs, which is small, where the index has it.
install torch==2.13.0+cpu 2> "$folder/log" || install torch==2.13.0
cat > "$folder/try.py" <<'PY'
import argparse
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch.serialization import add_safe_globals, clear_safe_globals, safe_globals

TYPES = [argparse.Namespace]


def loads(file: Path) -> str:
    try:
        return "loaded" if torch.load(file, weights_only=True) == argparse.Namespace(lr=0.1) else "something else"
    except UnpicklingError as error:
        return type(error).__name__


def in_block(file: Path) -> str:
    with safe_globals(TYPES):
        return loads(file)


def seen(file: Path) -> dict[str, list[str]]:
    """What loading ``file`` does before, in and after a block inside another allowance."""
    cases = {}
    with safe_globals(TYPES):
        cases["in an outer block"] = [loads(file), in_block(file), loads(file)]
    clear_safe_globals()
    add_safe_globals(TYPES)
    cases["allowed for the process"] = [loads(file), in_block(file), loads(file)]
    clear_safe_globals()
    with safe_globals(TYPES), ThreadPoolExecutor(1) as other:
        cases["inner block in another thread"] = [loads(file), other.submit(in_block, file).result(), loads(file)]
    return cases


expected = ["loaded", "loaded", "UnpicklingError"]
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "settings.pt"
    torch.save(argparse.Namespace(lr=0.1), file)
    cases = seen(file)
print("torch", torch.__version__)
for name, found in cases.items():
    print(f"{name}: {', '.join(found)}")
sys.exit(0 if all(found == expected for found in cases.values()) else "the behaviour has changed")
PY
OMP_NUM_THREADS=1 "$folder/venv/bin/python" "$folder/try.py" 2> "$folder/log" || { tail -n 20 "$folder/log"; exit 1; }
