#!/usr/bin/env bash
# deepspeed 0.19.8 (torch 2.13.0): load_checkpoint takes the name of a folder for a pattern, so "run[1]" loads "run1".
#
# save_checkpoint writes to the folder that it is given. load_checkpoint looks for the model's file with glob, in which the
# name of the folder and the tag are part of the pattern: "[1]" there means the character 1. A checkpoint in a folder with
# brackets in its name, as sweeps like to name their runs, is saved without a word and cannot be loaded: AssertionError, with no
# text. Worse, where there is a folder with the name that the pattern means, its weights and client state are loaded, and the
# path that is returned is the only sign of it. With ZeRO the optimizer's file is found by its plain name, so that the client
# state is the neighbour's and the weights are not. The way out is to keep brackets, stars and question marks out of the
# names of folders and tags, or to give glob.escape(folder) to load_checkpoint where there is no ZeRO.
#
# Seen on 2026-12-01 (the last lines of the output; the weights are 1 in the checkpoint of run[1] and 2 in that of run1):
#   stage 0, run[1] alone: AssertionError with the text ''
#   stage 0, run[1] beside run1: weights [2.0], client state of run1, path in run1
#   stage 1, run[1] alone: AssertionError with the text ''
#   stage 1, run[1] beside run1: weights [1.0], client state of run1, path in run1
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
install() { "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
# The build for CPUs, which is small, where the index has it.
install torch==2.13.0+cpu 2> "$folder/log" || install torch==2.13.0
install setuptools wheel ninja
install --no-build-isolation deepspeed==0.19.8
cat > "$folder/try.py" <<'PY'
import logging
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import torch

with redirect_stdout(sys.stderr):
    import deepspeed

logging.disable(logging.WARNING)
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


def engine(stage: int, weight: float) -> deepspeed.DeepSpeedEngine:
    """An engine whose weights are all ``weight``."""
    model = torch.nn.Linear(2, 2, bias=False)
    torch.nn.init.constant_(model.weight, weight)
    config = CONFIG | {"zero_optimization": {"stage": stage}}
    return deepspeed.initialize(model=model, optimizer=torch.optim.SGD(model.parameters(), lr=0.0), config=config)[0]


def save(stage: int, folder: Path, weight: float) -> None:
    saved = engine(stage, weight)
    saved.backward(saved(torch.ones(1, 2)).sum())
    saved.step()
    saved.save_checkpoint(str(folder), tag="end", client_state={"run": folder.name})


def load(stage: int, folder: Path) -> str:
    loaded = engine(stage, 0.0)
    try:
        path, state = loaded.load_checkpoint(str(folder), tag="end")
    except AssertionError as error:
        return f"AssertionError with the text '{error}'"
    weight = deepspeed.utils.safe_get_full_fp32_param(loaded.module.weight) if stage else loaded.module.weight
    return f"weights {weight.unique().tolist()}, client state of {state['run']}, path in {Path(path).parent.parent.name}"


def seen(stage: int) -> dict[str, str]:
    """What loading run[1] does without and with a run1 beside it."""
    cases = {}
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        save(stage, Path(folder) / "run[1]", 1.0)
        cases[f"stage {stage}, run[1] alone"] = load(stage, Path(folder) / "run[1]")
        save(stage, Path(folder) / "run1", 2.0)
        cases[f"stage {stage}, run[1] beside run1"] = load(stage, Path(folder) / "run[1]")
    return cases


cases = seen(0) | seen(1)
expected = {
    "stage 0, run[1] alone": "AssertionError with the text ''",
    "stage 0, run[1] beside run1": "weights [2.0], client state of run1, path in run1",
    "stage 1, run[1] alone": "AssertionError with the text ''",
    "stage 1, run[1] beside run1": "weights [1.0], client state of run1, path in run1",
}
print("deepspeed", deepspeed.__version__)
for name, found in cases.items():
    print(f"{name}: {found}")
sys.exit(0 if cases == expected else "the behaviour has changed")
PY
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH" TORCH_EXTENSIONS_DIR="$folder/built"
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1
MASTER_PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export MASTER_PORT
python "$folder/try.py" 2> "$folder/log" || { tail -n 20 "$folder/log"; exit 1; }
