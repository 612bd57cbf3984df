#!/usr/bin/env bash
# deepspeed 0.19.8 (torch 2.13.0): at ZeRO-1 and 2 the optimizer's moments can be read for the first parameter group only.
#
# safe_get_full_optimizer_state(parameter, "exp_avg") is the public way to read Adam's moments, whatever the stage. Training
# usually has two groups: matrices, which decay, and biases and norms, which do not. The moments of every parameter outside
# the first group raise ValueError, although they exist and training uses them: the optimizer notes where they lie while it
# steps through the groups, once, at a moment when only the first group has any. ZeRO-3 reads all of them. With several ranks
# the call is a collective, so a rank that catches the error leaves the others waiting. With one group everything is read.
#
# Seen on 2026-11-30 (the last lines of the output):
#   ZeRO-1, two groups: weight (4, 4); bias ValueError: exp_avg not found in optimizer state fragment
#   ZeRO-2, two groups: weight (4, 4); bias ValueError: exp_avg not found in optimizer state fragment
#   ZeRO-3, two groups: weight (4, 4); bias (4,)
#   ZeRO-1, one group: weight (4, 4); bias (4,)
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
from contextlib import redirect_stdout

import torch

with redirect_stdout(sys.stderr):
    import deepspeed
    from deepspeed.utils import safe_get_full_optimizer_state

logging.disable(logging.WARNING)
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


def moment(parameter: torch.nn.Parameter) -> str:
    """The shape of Adam's first moment of a parameter, or why it cannot be read."""
    try:
        return str(tuple(safe_get_full_optimizer_state(parameter, "exp_avg").shape))
    except ValueError as error:
        return f"ValueError: {error}"


def seen(stage: int, groups: int) -> str:
    """What is read of each parameter of a layer after two updates."""
    with redirect_stdout(sys.stderr):
        model = torch.nn.Linear(4, 4)
        apart = [{"params": [model.weight], "weight_decay": 0.1}, {"params": [model.bias], "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(apart if groups == 2 else model.parameters())
        config = CONFIG | {"zero_optimization": {"stage": stage}}
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        for _ in range(2):
            engine.backward(engine(torch.ones(1, 4)).sum())
            engine.step()
        return "; ".join(f"{name} {moment(parameter)}" for name, parameter in engine.module.named_parameters())


whole = "weight (4, 4); bias (4,)"
first = "weight (4, 4); bias ValueError: exp_avg not found in optimizer state fragment"
expected = {
    "ZeRO-1, two groups": first,
    "ZeRO-2, two groups": first,
    "ZeRO-3, two groups": whole,
    "ZeRO-1, one group": whole,
}
cases = {
    "ZeRO-1, two groups": seen(1, 2),
    "ZeRO-2, two groups": seen(2, 2),
    "ZeRO-3, two groups": seen(3, 2),
    "ZeRO-1, one group": seen(1, 1),
}
print("deepspeed", deepspeed.__version__)
for name, found in cases.items():
    print(f"{name}: {found}")
sys.exit(0 if cases == expected else "the behaviour has changed")
PY
export DS_ACCELERATOR=cpu CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=1 PATH="$folder/venv/bin:$PATH"
export RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1
MASTER_PORT=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
export MASTER_PORT
python "$folder/try.py" 2> "$folder/log" || { tail -n 20 "$folder/log"; exit 1; }
