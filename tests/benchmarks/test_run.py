"""Figures are merged by name, and every part runs and says how it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.figures import Figure, record, table

pytestmark = pytest.mark.early

SCORING = {
    "scoring.http_vs_offline", "scoring.http_vs_forward_per_request", "scoring.http_batched_vs_offline",
    "scoring.transport_requests_per_second", "scoring.offline_vs_padded",
    *(f"scoring.latency_p{share}_at_{load}" for share in (50, 99) for load in (50, 80, 100)),
}  # fmt: skip
LEARNED = {
    f"ppo.{name}.{figure}" for name in ("ppo", "grpo", "rloo", "reinforce++") for figure in ("gold_win_rate", "kl")
}
LEARNED |= {"ppo.best_of_n.gold_win_rate", "ppo.best_of_n.kl", "ppo.grpo.pass_rate", "ppo.grpo.pass_rate_start"}
HABITS = ("habit_rate", "habit_rate_start", "habits_per_answer", "habits_per_answer_start")
LEARNED |= {f"ppo.without_kl.{figure}" for figure in ("gold_fall", "reward_rise", *HABITS)}
MODELS = {
    "models.packed_vs_padded_training", "models.packed_vs_padded_scoring", "models.packed_vs_padded_training_unshared",
    "models.packed_vs_padded_scoring_unshared", "models.log_probs_memory_vs_naive",
    "models.log_probs_memory_vs_naive_at_half_length",
}  # fmt: skip
ALONE = {"reward_training.prefix_sharing_gain", "reward_training.share_of_matmul_roof"}
"""What can be measured without TRL beside."""
NAMES = {"weights.update_ms", *MODELS, *ALONE, *SCORING, *LEARNED}


def kept(path: Path) -> dict[str, dict[str, object]]:
    return json.loads(path.read_text())["figures"]


def test_a_newer_figure_replaces_its_own_name_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "results" / "latest.json"
    record({"a.one": Figure(1.0, "x", True, "first"), "a.two": Figure(2.0, "s", False, "first")}, path)
    record({"a.two": Figure(3.0, "s", False, "second"), "b": Figure(4.0, "x", True, "second")}, path)
    found = kept(path)
    assert {name: figure["value"] for name, figure in found.items()} == {"a.one": 1.0, "a.two": 3.0, "b": 4.0}
    assert found["a.two"] == {"value": 3.0, "unit": "s", "higher_is_better": False, "method": "second"}
    content = json.loads(path.read_text())
    assert set(content) == {"figures", "machine", "versions", "date"}
    assert content["versions"]["torch"] and content["machine"]["cores"] >= 1


def test_the_table_has_a_line_for_each_figure() -> None:
    lines = table({"b": Figure(0.5, "s", False, "slowly"), "a.longer": Figure(12345.0, "x", True, "fast")}).splitlines()
    assert [line.split() for line in lines] == [["a.longer", "1.234e+04", "x", "fast"], ["b", "0.5", "s", "slowly"]]


def test_every_part_runs_and_adds_to_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    record({"faults.kills": Figure(3.0, "kills", True, "kept from before")}, path)
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--results", str(path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=root, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    found = kept(path)
    assert set(found) == {*NAMES, "faults.kills"} and found["faults.kills"]["value"] == 3.0
    assert all(found[name]["method"] for name in NAMES)
    assert all(found[name]["value"] > 0 for name in NAMES - LEARNED), "two steps learn nothing"
    assert {line.split()[0] for line in done.stdout.splitlines() if line.strip()} >= NAMES
