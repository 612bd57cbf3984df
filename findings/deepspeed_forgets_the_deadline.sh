#!/usr/bin/env bash
# deepspeed 0.19.8 (torch 2.13.0): the deadline given to init_distributed is not that of the collectives of training.
#
# deepspeed.init_distributed(timeout=...) sets how long a rank waits for a peer that died or hangs. It reaches the process
# group of the world, which torch makes there. But an engine reduces gradients in a group of its own, a copy of the world that
# deepspeed makes with torch's new_group and no timeout; and new_group without one takes torch's default of 30 minutes, not
# that of the world. So a rank that a program allows one minute is waited for half an hour at the next update.
#
# Seen on 2026-11-30 (the last lines of the output):
#   the world: 0:01:00
#   new_group of torch: 0:30:00
#   gradients of an engine: 0:30:00, another group than the world
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
from datetime import timedelta

import torch
import torch.distributed

with redirect_stdout(sys.stderr):
    import deepspeed

logging.disable(logging.WARNING)
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {"stage": 1},
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


def deadline(group: torch.distributed.ProcessGroup) -> str:
    """How long a collective of a group on CPU waits, as the group itself says."""
    return str(group._get_backend(torch.device("cpu")).options._timeout)


with redirect_stdout(sys.stderr):
    deepspeed.init_distributed(dist_backend="gloo", timeout=timedelta(minutes=1))
    model = torch.nn.Linear(4, 4)
    engine = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(model.parameters()), config=CONFIG)[0]
world = torch.distributed.group.WORLD
other = "the world" if engine.data_parallel_group is world else "another group than the world"
cases = {
    "the world": deadline(world),
    "new_group of torch": deadline(torch.distributed.new_group([0])),
    "gradients of an engine": f"{deadline(engine.data_parallel_group)}, {other}",
}
expected = {
    "the world": "0:01:00",
    "new_group of torch": "0:30:00",
    "gradients of an engine": "0:30:00, another group than the world",
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
