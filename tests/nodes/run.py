"""What two machines must do together, which takes too long for `make test`: ``python -m tests.nodes.run``, as root.

Every line that it prints is a sentence that held; the first that does not ends it with 1.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from rlhf_ray.runs.directory import RunDirectory
from tests.nodes.machines import OWN_DISK, PYTHON, Machine, missing, placed_on, start_cluster, two_machines

PPO = (
    str(Path(__file__).parents[1] / "e2e" / "ppo_tiny.yaml"), "steps=3", "run.deterministic=false", "evaluation.prompts=1",
    "batch.prompts_per_step=8", "batch.sequences_per_update=8", "policy.resources.cpus_per_rank=0.6",
    *(f"{role}.resources.cpus_per_rank=0.1" for role in ("critic", "reference", "reward", "rollout")),
    "cluster.address=auto",
)  # fmt: skip
SFT = (
    "demo-sft", "policy.model.make.shape=llama-tiny", "policy.resources.cpus_per_rank=0.6", "data.world.demonstrations=128",
    "batch.sequences_per_update=32", "evaluation.every_steps=0",
)  # fmt: skip
JOINED = ("policy.ranks=2", "cluster.address=auto")


def ppo_trains(first: Machine, second: Machine, root: Path) -> None:
    """A policy with a rank on each machine trains, and agrees with the rollout engines"""
    said = first.rlhf_ray("train", "ppo", *PPO, f"run.root={root}")
    assert placed_on(said, "policy: 2 ranks") == {f"{first.address} (node1)", f"{second.address} (node2)"}, said[-3000:]
    steps = [line for line in RunDirectory.open(root / "tiny").metrics.read() if "reward/learned" in line]
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert max(step["rollout/log_prob_difference"] for step in steps) <= 1e-4


def an_unshared_run_is_refused(first: Machine, second: Machine, root: Path) -> None:
    """A run directory that only one machine sees is refused with the node's name, and nothing is left on either"""
    own = f"{OWN_DISK}/home/runs"
    said = first.rlhf_ray("train", "ppo", *PPO, f"run.root={own}", expect=2)
    assert f"node {second.address} (node2) does not see the run directory {own}/tiny" in said, said[-3000:]
    for machine in (first, second):
        assert machine.run("find", f"{OWN_DISK}/home", "-path", "*runs/*") == ""


def a_stopped_run_goes_on_from_the_other_machine(first: Machine, second: Machine, root: Path) -> None:
    """A run that was stopped goes on over both machines when `resume` is typed on the other, without an address"""
    run, training = _begin(first, root)
    _driver(training).send_signal(signal.SIGTERM)
    said = training.communicate(timeout=120)[0]
    assert training.returncode == 75, said[-3000:]
    (commit,) = run.checkpoints.steps()
    config = run.config_path.read_text()
    run.config_path.write_text(config.replace("epochs: 1000.0", f"epochs: {(commit + 2) / 4}"))
    said = second.rlhf_ray("resume", run.path)
    assert f"joined the Ray cluster at {first.address}:6379" in said, said[-3000:]
    assert run.metrics.read()[-1]["step"] == commit + 2 and run.final.is_dir()


def a_dead_node_is_named(first: Machine, second: Machine, root: Path) -> None:
    """A machine that dies is named by the error, with its rank, and not the rank that noticed"""
    _, training = _begin(first, root)
    time.sleep(2.0)
    second.power_off()
    began = time.monotonic()
    said = training.communicate(timeout=120)[0]
    assert training.returncode == 1, said[-3000:]
    named = rf"policy rank \d failed in \w+: its process on node {re.escape(second.address)} \(node2\) died"
    assert re.search(named, said), said[-3000:]
    assert time.monotonic() - began < 30


def a_lone_rank_needs_no_name(first: Machine, second: Machine, root: Path) -> None:
    """On a machine whose own name resolves to nothing a rank trains, and Ray is started for it"""
    first.rlhf_ray(
        "train", "sft", *SFT, "policy.ranks=1", "cluster.object_store_mb=100", "epochs=1", f"run.root={root}"
    )


def _begin(machine: Machine, root: Path) -> tuple[RunDirectory, subprocess.Popen[str]]:
    """A long run of two ranks that has made steps."""
    words = ["train", "sft", *SFT, *JOINED, "epochs=1000", f"run.root={root}"]
    training = machine.start(PYTHON, "-m", "rlhf_ray", *words)
    run, deadline = RunDirectory(root / "demo-sft"), time.monotonic() + 120
    while len(run.metrics.read()) < 3:
        assert training.poll() is None and time.monotonic() < deadline, "no step was made"
        time.sleep(0.2)
    return run, training


def _driver(training: subprocess.Popen[str]) -> psutil.Process:
    """The command that was typed there, which nsenter started."""
    started = psutil.Process(training.pid).children(recursive=True)
    return next(process for process in started if "rlhf_ray" in process.cmdline())


def main() -> int:
    lacking = missing()
    if lacking is not None:
        sys.stderr.write(f"two machines cannot be made of this one without {lacking}\n")
        return 1
    together = (
        ppo_trains,
        an_unshared_run_is_refused,
        a_stopped_run_goes_on_from_the_other_machine,
        a_dead_node_is_named,
    )
    with tempfile.TemporaryDirectory(prefix="nodes-") as name, two_machines(Path(name)) as machines:
        start_cluster(*machines)
        for check in together:
            _hold(check, *machines, Path(name) / check.__name__)
    with tempfile.TemporaryDirectory(prefix="nodes-") as name, two_machines(Path(name), own_name=None) as machines:
        _hold(a_lone_rank_needs_no_name, *machines, Path(name) / "lone")
    return 0


def _hold(check: Callable[[Machine, Machine, Path], None], first: Machine, second: Machine, root: Path) -> None:
    began = time.monotonic()
    check(first, second, root)
    sys.stdout.write(f"{check.__doc__}: held, {time.monotonic() - began:.0f} s\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
