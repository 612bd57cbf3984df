#!/usr/bin/env bash
# deepspeed 0.19.8 (torch 2.13.0): after a universal checkpoint of ZeRO-3 Adam counts every step once for each parameter group.
#
# A universal checkpoint (deepspeed.checkpoint.ds_to_universal) is how a run goes on with another number of ranks. At ZeRO-3
# loading puts one and the same tensor into the state of all groups as their number of steps. Adam of torch counts in place,
# and DeepSpeed steps through the groups one by one: with two groups, as for matrices that decay and biases that do not, each
# step counts twice, and with a sub_group_size that cuts a large model into a hundred parts, a hundred times. The correction of
# Adam's moments then fades too early, so updates differ from those of a run that went on, while everything that one looks at
# right after loading is right: weights, moments and the step itself. Nothing is raised or logged. The way out is to give
# each state in engine.optimizer.optimizer.state a copy of its "step" after load_checkpoint.
#
# Seen on 2026-12-01 (the last lines of the output; saved after two steps, then two more):
#   ZeRO-1, two groups: steps 2 2 when loaded, 4 4 two later; weights as in the run that went on
#   ZeRO-3, one group: steps 2 when loaded, 4 two later; weights as in the run that went on
#   ZeRO-3, two groups: steps 2 2 when loaded, 6 6 two later; weights differ
#   ZeRO-3, two groups, steps copied: steps 2 2 when loaded, 4 4 two later; weights as in the run that went on
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
    from deepspeed.utils import safe_get_full_fp32_param

logging.disable(logging.WARNING)
CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_force_ds_cpu_optimizer": False,
    "zero_allow_untested_optimizer": True,
}


def engine(stage: int, count: int, universal: bool) -> deepspeed.DeepSpeedEngine:
    """An engine whose two parameters are in ``count`` groups with equal settings."""
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 4)
    parameters = list(model.parameters())
    groups = [{"params": parameters}] if count == 1 else [{"params": [one]} for one in parameters]
    config = CONFIG | {"zero_optimization": {"stage": stage}, "checkpoint": {"load_universal": universal}}
    return deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=0.1), config=config)[0]


def train(engine: deepspeed.DeepSpeedEngine) -> None:
    for _ in range(2):
        engine.backward(engine(torch.ones(1, 4)).square().sum())
        engine.step()


def states(engine: deepspeed.DeepSpeedEngine) -> list[dict]:
    return [state for state in engine.optimizer.optimizer.state.values() if "step" in state]


def steps(engine: deepspeed.DeepSpeedEngine) -> str:
    return " ".join(f"{float(state['step']):g}" for state in states(engine))


def weights(engine: deepspeed.DeepSpeedEngine) -> torch.Tensor:
    return torch.cat([safe_get_full_fp32_param(one).flatten() for one in engine.module.parameters()])


def seen(stage: int, count: int, copied: bool = False) -> str:
    """The steps and weights of a new engine that loaded a universal checkpoint, beside those of the one that saved it."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        first = engine(stage, count, universal=False)
        train(first)
        first.save_checkpoint(folder, tag="two")
        convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
        convert += ["--input_folder", f"{folder}/two", "--output_folder", f"{folder}/two_universal"]
        subprocess.run(convert, check=True, capture_output=True)
        second = engine(stage, count, universal=True)
        second.load_checkpoint(folder, tag="two_universal")
        if not torch.equal(weights(first), weights(second)):
            return "other weights were loaded"
        loaded = steps(second)
        for state in states(second) if copied else []:
            state["step"] = state["step"].clone()
        train(first)
        train(second)
        same = torch.allclose(weights(first), weights(second), rtol=0, atol=1e-6)
    how = "weights as in the run that went on" if same else "weights differ"
    return f"steps {loaded} when loaded, {steps(second)} two later; {how}"


cases = {
    "ZeRO-1, two groups": seen(1, 2),
    "ZeRO-3, one group": seen(3, 1),
    "ZeRO-3, two groups": seen(3, 2),
    "ZeRO-3, two groups, steps copied": seen(3, 2, copied=True),
}
same, differ = "weights as in the run that went on", "weights differ"
expected = {
    "ZeRO-1, two groups": f"steps 2 2 when loaded, 4 4 two later; {same}",
    "ZeRO-3, one group": f"steps 2 when loaded, 4 two later; {same}",
    "ZeRO-3, two groups": f"steps 2 2 when loaded, 6 6 two later; {differ}",
    "ZeRO-3, two groups, steps copied": f"steps 2 2 when loaded, 4 4 two later; {same}",
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
