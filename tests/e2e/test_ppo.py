"""PPO on the whole real stack: two policy ranks, a critic, a reward, a reference group and two vLLM engines.

What must hold: weights change on every rank and in the engines with them; trainer and rollout agree before and after each
update; a run that is killed inside a step and resumed ends bit for bit where it would have. That the learned reward rises
is asserted of the same run at ZeRO-2, which ``test_jobs.py`` submits as a job.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import threading
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.config.loading import load_config
from rlhf_ray.models import load_policy
from rlhf_ray.models.disk_names import to_disk_names
from rlhf_ray.runs.directory import RunDirectory
from tests.e2e.conftest import DEADLINE_S, command, command_lines, listening_beyond_loopback, metrics, run

pytestmark = pytest.mark.early

CONFIG = Path(__file__).with_name("ppo_tiny.yaml")
STEPS = 6


class Ports:
    """Looks again and again, while something runs, what other machines could connect to, and whose ports it saw."""

    def __init__(self) -> None:
        self.open: set[tuple[str, int]] = set()
        self.looked_at: set[str] = set()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Ports:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=60)

    def _look(self) -> None:
        while not self._over.wait(0.5):
            running = psutil.Process().children(recursive=True)
            self.open |= listening_beyond_loopback(running)
            self.looked_at |= set(re.findall(r"\w+", " ".join(command_lines(running))))


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


@pytest.fixture(scope="module")
def watch() -> Ports:
    """The ports of the undisturbed run."""
    return Ports()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, watch: Ports) -> Path:
    """A ZeRO-3 run from start to end."""
    root = tmp_path_factory.mktemp("undisturbed")
    with watch:
        output = run("train", "ppo", CONFIG, f"run.root={root}")
    assert "start-up self-check" in output
    return root / "tiny"


def test_no_other_machine_could_connect_to_any_process_of_the_run(undisturbed: Path, watch: Ports) -> None:
    assert {"PolicyModelActor", "RolloutActor", "raylet", "gcs_server"} <= watch.looked_at
    assert watch.open == set()


def test_trainer_and_rollout_agree_before_and_after_every_update(undisturbed: Path) -> None:
    steps = metrics(undisturbed)
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert max(step["rollout/log_prob_difference"] for step in steps) <= 1e-4
    assert [step["weights/version"] for step in steps] == list(range(1, STEPS + 1))


def test_the_first_ratio_is_exactly_one(undisturbed: Path) -> None:
    for step in metrics(undisturbed):
        assert step["ratio/mean"] == 1.0 and step["approximate_kl"] == 0.0 and step["clip_fraction"] == 0.0


def test_weights_change_and_the_policy_moves_away_from_the_reference(undisturbed: Path) -> None:
    start = load_policy(load_config(CONFIG, kind="ppo").policy.model)  # which is the reference's model, too
    before, after = dict(to_disk_names(start.model)), weights(undisturbed / "final")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)
    steps = metrics(undisturbed)
    assert steps[0]["kl/k3"] == 0.0 < steps[1]["kl/k3"] < steps[-1]["kl/k3"]


def test_every_prompt_is_in_the_ledger_once(undisturbed: Path) -> None:
    entries = RunDirectory.open(undisturbed).ledger.entries()
    assert [entry.step for entry in entries] == list(range(1, STEPS + 1))
    assert max(Counter(prompt for entry in entries for prompt in entry.prompt_ids).values()) == 1


def kill_inside_step_five(root: Path) -> None:
    """SIGKILL to the driver as soon as step 5 is in the ledger and before its successor's checkpoint."""
    parent = subprocess.Popen(command("train", "ppo", CONFIG, f"run.root={root}"), stderr=subprocess.DEVNULL)
    ledger, deadline = root / "tiny" / "ledger.jsonl", time.monotonic() + DEADLINE_S
    while not (ledger.exists() and ledger.read_text().count("\n") >= 5):
        assert parent.poll() is None and time.monotonic() < deadline, "the run ended before step 5"
        time.sleep(0.002)
    (driver,) = [child for child in psutil.Process(parent.pid).children() if "driver" in " ".join(child.cmdline())]
    os.kill(driver.pid, signal.SIGKILL)
    assert parent.wait(timeout=60) == 1


def test_a_killed_run_resumes_to_the_same_bits(undisturbed: Path, tmp_path: Path) -> None:
    kill_inside_step_five(tmp_path)
    killed = RunDirectory.open(tmp_path / "tiny")
    assert killed.checkpoints.steps() == [2, 4]
    run("resume", tmp_path / "tiny")

    lines = metrics(tmp_path / "tiny")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    entries = RunDirectory.open(tmp_path / "tiny").ledger.entries()
    assert [(entry.step, entry.attempt) for entry in entries] == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 2)]
    assert entries == [
        type(entry)(entry.step, again.attempt, entry.prompt_ids)
        for entry, again in zip(RunDirectory.open(undisturbed).ledger.entries(), entries, strict=True)
    ]
    for part in (".", "critic"):
        resumed, whole = weights(tmp_path / "tiny" / "final" / part), weights(undisturbed / "final" / part)
        assert all(torch.equal(resumed[name], whole[name]) for name in whole), f"other weights in final/{part}"
