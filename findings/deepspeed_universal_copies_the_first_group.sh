#!/usr/bin/env bash
# deepspeed 0.19.8 (torch 2.13.0): a universal checkpoint of ZeRO-3 gives every parameter group the settings of the first.
#
# Training usually has two groups: matrices, which decay, and biases and norms, which do not; a score head often has a learning
# rate of its own. A universal checkpoint (deepspeed.checkpoint.ds_to_universal) is how a run goes on with another number of
# ranks. At ZeRO-1 and 2 every group gets its own settings back. At ZeRO-3 loading copies learning rate, betas and weight
# decay of the first group into all of them, over what the new optimizer was made with. Nothing is raised or logged, and the
# first loss is right, since weights and moments are: the run departs from the second update on. The way out is to keep the
# settings of optimizer.param_groups and to put them back after load_checkpoint.
#
# Seen on 2026-11-30 (the last lines of the output):
#   ZeRO-1: (lr 0.1, decay 0.1) (lr 0.01, decay 0.0), loaded: (lr 0.1, decay 0.1) (lr 0.01, decay 0.0)
#   ZeRO-2: (lr 0.1, decay 0.1) (lr 0.01, decay 0.0), loaded: (lr 0.1, decay 0.1) (lr 0.01, decay 0.0)
#   ZeRO-3: (lr 0.1, decay 0.1) (lr 0.01, decay 0.0), loaded: (lr 0.1, decay 0.1) (lr 0.1, decay 0.1)
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
import subprocess
import sys
import tempfile
from contextlib import redirect_stdout

import torch

with redirect_stdout(sys.stderr):
    import deepspeed

logging.disable(logging.WARNING)
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


def engine(stage: int, universal: bool) -> deepspeed.DeepSpeedEngine:
    """An engine with two groups, each with settings of its own."""
    model = torch.nn.Linear(4, 4)
    groups = [
        {"params": [model.weight], "lr": 0.1, "weight_decay": 0.1},
        {"params": [model.bias], "lr": 0.01, "weight_decay": 0.0},
    ]
    config = CONFIG | {"zero_optimization": {"stage": stage}, "checkpoint": {"load_universal": universal}}
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups), config=config)[0]


def settings(engine: deepspeed.DeepSpeedEngine) -> str:
    return " ".join(f"(lr {group['lr']}, decay {group['weight_decay']})" for group in engine.optimizer.param_groups)


def seen(stage: int) -> str:
    """The settings of the groups when a checkpoint is saved, and in a new engine that has loaded its universal form."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        trained = engine(stage, universal=False)
        for _ in range(2):
            trained.backward(trained(torch.ones(1, 4)).sum())
            trained.step()
        trained.save_checkpoint(folder, tag="two")
        convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        convert += ["--input_folder", f"{folder}/two", "--output_folder", f"{folder}/two_universal"]
        subprocess.run(convert, check=True, capture_output=True)
        loaded = engine(stage, universal=True)
        loaded.load_checkpoint(folder, tag="two_universal")
        return f"{settings(trained)}, loaded: {settings(loaded)}"


own, first = "(lr 0.1, decay 0.1) (lr 0.01, decay 0.0)", "(lr 0.1, decay 0.1) (lr 0.1, decay 0.1)"
expected = {1: f"{own}, loaded: {own}", 2: f"{own}, loaded: {own}", 3: f"{own}, loaded: {first}"}
cases = {stage: seen(stage) for stage in expected}
print("deepspeed", deepspeed.__version__)
for stage, found in cases.items():
    print(f"ZeRO-{stage}: {found}")
sys.exit(0 if cases == expected else "the behaviour has changed")
PY
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH"
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1
MASTER_PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export MASTER_PORT
python "$folder/try.py" 2> "$folder/log" || { tail -n 20 "$folder/log"; exit 1; }
