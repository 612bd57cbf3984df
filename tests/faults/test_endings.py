"""What is wrong with the ending of a run is named, and nothing is where nothing is: shown on runs that only write files."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest

from rlhf_ray.runs.directory import RunDirectory
from tests.faults import endings
from tests.faults.endings import Event, troubles

RUN = """
import os, signal, sys, time
from pathlib import Path
root, behaviour = Path(sys.argv[1]), sys.argv[2]
from rlhf_ray.runs.directory import RunDirectory
def stop(number, frame):
    if behaviour != "silent":
        print("stopped; go on with: rlhf-ray resume", flush=True)
    if behaviour != "commits nothing":
        (root / "run/checkpoints/step-000003").mkdir(parents=True)
        (root / "run/checkpoints/step-000003/manifest.json").touch()
    os._exit(1 if behaviour == "fails" else 75)
signal.signal(signal.SIGTERM, stop)
run = RunDirectory.create(root / "run", "kind: sft\\n")
if behaviour == "leaves a process" and os.fork() == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
for step in range(1, 4):
    run.metrics.append({"step": step, "timestamp": 0.0})
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("behaviour", "trouble"),
    [
        ("ends well", None),
        ("fails", "ended with 1, not 75"),
        ("silent", "did not say"),
        ("commits nothing", "committed nothing"),
        ("leaves a process", "left running"),
    ],
)
def test_a_run_that_does_not_end_as_it_must_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, behaviour, trouble
):
    (tmp_path / "run.py").write_text(RUN)
    monkeypatch.setattr(endings, "LEFT_AFTER_S", 0.5)
    monkeypatch.setattr(
        endings, "command", lambda *words: [sys.executable, str(tmp_path / "run.py"), str(tmp_path), behaviour]
    )
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    event = Event(endings._signal_group(signal.SIGTERM), 75, "go on with: rlhf-ray resume", within_s=1.0)
    found = troubles(event, tmp_path)
    assert [trouble in one for one in found] == [True] if trouble else found == []
    assert RunDirectory(tmp_path / "run").metrics.read()
