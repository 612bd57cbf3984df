"""The campaign kills, resumes, compares and keeps its figures: shown on a job that only writes its run directory."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.faults import campaign

JOB = """
import subprocess, sys, time
from pathlib import Path
what, run, weight = sys.argv[1:4]
if "rlhf_ray.launch.driver" not in sys.argv:
    sys.exit(1 if subprocess.call([sys.executable, __file__, *sys.argv[1:], "rlhf_ray.launch.driver"]) else 0)
import numpy
from safetensors.numpy import save_file
from rlhf_ray.runs.directory import RunDirectory
kept = RunDirectory.create(run, "kind: ppo\\n") if what == "train" else RunDirectory.resume(run)[0]
for step in range(1, 6):
    time.sleep(0.2)
    kept.ledger.append(step, [step])
kept.final.mkdir(exist_ok=True)
save_file({"w": numpy.array([float(weight)])}, kept.final / "model.safetensors")
"""


def use_job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resumed_weight: str) -> None:
    job = tmp_path / "job.py"
    job.write_text(JOB)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    calls: list[str] = []

    def command(what: str, *arguments: object) -> list[str]:
        calls.append(what)  # the undisturbed run, the one that is killed, and what follows
        weight = "1.0" if len(calls) <= 2 else resumed_weight
        run = arguments[0] if what == "resume" else Path(str(arguments[-1]).partition("=")[2]) / "tiny"
        return [sys.executable, str(job), what, str(run), weight]

    monkeypatch.setattr(campaign, "command", command)
    monkeypatch.setattr(campaign, "VICTIMS", ("driver",))


@pytest.mark.parametrize(("resumed_weight", "share"), [("1.0", 1.0), ("1.5", 0.0)])
def test_runs_are_killed_resumed_and_judged(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, resumed_weight: str, share: float
) -> None:
    use_job(monkeypatch, tmp_path, resumed_weight)
    monkeypatch.setattr(campaign.random.Random, "uniform", lambda self, low, high: 0.8 * high)
    results = tmp_path / "latest.json"
    outcomes = campaign.campaign(tmp_path / "runs", kills=1, seconds=60.0, seed=0, results=results)
    (outcome,) = [outcome for outcome in outcomes if outcome.killed is not None]
    assert outcome.victim == "driver" and outcome.resumes == 1 and outcome.identical == (share == 1.0)
    figures = json.loads(results.read_text())["figures"]
    assert (figures["faults.kills"]["value"], figures["faults.bit_identical_share"]["value"]) == (1.0, share)
