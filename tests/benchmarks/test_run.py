"""Figures are merged by name, and every part runs and says how it measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.figures import REFERENCE, Figure, read, record, table
from benchmarks.run import PARTS, main
from benchmarks.sequences import REAL_PAIRS

pytestmark = pytest.mark.early

SCORING = {
    "scoring.http_vs_offline", "scoring.http_vs_forward_per_request", "scoring.http_batched_vs_offline",
    "scoring.transport_requests_per_second", "scoring.offline_vs_padded",
    *(f"scoring.latency_p{share}_at_{load}" for share in (50, 99) for load in (50, 80, 100)),
}  # fmt: skip
MODES = {"ppo.one_step_off_vs_sync", "ppo.staleness_vs_closed_form"}
WATCHING = {"watching.share_of_a_request", "watching.share_of_a_step", "watching.alarms_share_of_a_core"}
LEARNED = {
    f"ppo.{name}.{figure}" for name in ("ppo", "grpo", "rloo", "reinforce++") for figure in ("gold_win_rate", "kl")
}
LEARNED |= {"ppo.best_of_n.gold_win_rate", "ppo.best_of_n.kl", "ppo.best_of_n.samples"}
LEARNED |= {"ppo.best_of_n_by_score.gold_win_rate", "ppo.reward_model_accuracy"}
LEARNED |= {"ppo.grpo.pass_rate", "ppo.grpo.pass_rate_start"}
HABITS = ("habit_rate", "habit_rate_start", "habits_per_answer", "habits_per_answer_start")
PEAKS = {f"{name}_{moment}" for name in ("gold", "reward", "kl") for moment in ("peak", "end")}
QUALITIES = ("in_time", "in_time_start", "polite", "polite_start")
LEARNED |= {
    f"ppo.without_kl.{figure}"
    for figure in ("gold_fall", "reward_rise", "reward_model_accuracy", *HABITS, *PEAKS, *QUALITIES)
}
MODELS = {
    "models.packed_vs_padded_training", "models.packed_vs_padded_scoring", "models.packed_vs_padded_training_unshared",
    "models.packed_vs_padded_scoring_unshared", "models.log_probs_memory_vs_naive",
    "models.log_probs_memory_vs_naive_at_half_length",
}  # fmt: skip
ALONE = {
    "dpo.reference_share",
    "reward_training.prefix_sharing_gain",
    "reward_training.share_of_matmul_roof",
    "sft.packing_gain",
}
"""What can be measured without TRL beside it."""
ENCODERS = {f"encoders.{kind}_vs_padded" for kind in ("bert", "deberta-v2", "modernbert")}
WEIGHTS = {"weights.update_ms", "weights.publish_ms", "weights.publish_over_copy_rate", "weights.copies_over_in_place"}
NAMES = {*WEIGHTS, *ENCODERS, *MODELS, *ALONE, *SCORING}


def stored(path: Path) -> dict[str, dict[str, Any]]:
    figures: dict[str, dict[str, Any]] = json.loads(path.read_text())["figures"]
    return figures


def test_a_newer_figure_replaces_its_own_name_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "results" / "latest.json"
    record({"a.one": Figure(1.0, "x", True, "first"), "a.two": Figure(2.0, "s", False, "first")}, path)
    before = stored(path)["a.one"]
    record({"a.two": Figure(3.0, "s", False, "second"), "b": Figure(4.0, "x", True, "second", (4.0, 5.0))}, path)
    figures = stored(path)
    assert {name: figure["value"] for name, figure in figures.items()} == {"a.one": 1.0, "a.two": 3.0, "b": 4.0}
    assert figures["a.one"] == before
    assert (
        figures["a.two"] | {"value": 3.0, "unit": "s", "higher_is_better": False, "method": "second"}
        == figures["a.two"]
    )
    content = json.loads(path.read_text())
    assert set(content) == {"figures", "machine", "versions", "date"}
    for origin in (content, *figures.values()):
        assert origin["versions"]["torch"] and origin["machine"]["cores"] >= 1 and origin["date"]
    assert read(path)["b"] == Figure(4.0, "x", True, "second", (4.0, 5.0))


def test_the_worst_seed_is_the_figure() -> None:
    assert Figure.worst([0.9, 0.8, 0.95], "share", "how").value == 0.8
    assert Figure.worst([0.9, 0.8, 0.95], "nats", "how", higher_is_better=False).value == 0.95


@pytest.mark.parametrize("file", [["--keep"], ["--results", str(REFERENCE)]])
def test_a_quick_run_is_never_kept(file: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--quick", "--only", "weights", *file])
    assert "a quick run measures nothing" in capsys.readouterr().err


def test_a_part_that_does_not_exist_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--quick", "--only", "models,modles"])
    assert (
        "modles is no part: choose from checkpoints, demo, dpo, encoders, generate, gym, gym_turns"
        in capsys.readouterr().err
    )


def test_the_table_has_a_line_for_each_figure() -> None:
    lines = table({"b": Figure(0.5, "s", False, "slowly"), "a.longer": Figure(12345.0, "x", True, "fast")}).splitlines()
    assert [line.split() for line in lines] == [["a.longer", "1.234e+04", "x", "fast"], ["b", "0.5", "s", "slowly"]]


ON_REAL_PAIRS = [
    pytest.mark.long,
    pytest.mark.skipif(not REAL_PAIRS.is_file(), reason="the real pairs are not here"),
]


@pytest.mark.parametrize(
    ("left_out", "expected"),
    [
        (
            {
                "checkpoints",
                "demo",
                "generate",
                "gym",
                "gym_turns",
                "learning",
                "ppo",
                "rollout_modes",
                "watching",
                "weight_ways",
            },
            NAMES,
        ),
        pytest.param({*PARTS} - {"checkpoints"}, {"checkpoint.stall_seconds"}, marks=pytest.mark.long),
        pytest.param({*PARTS} - {"learning"}, LEARNED, marks=pytest.mark.long),
        pytest.param({*PARTS} - {"rollout_modes"}, MODES, marks=pytest.mark.long),
        pytest.param({*PARTS} - {"watching"}, WATCHING, marks=pytest.mark.long),
        pytest.param({*PARTS} - {"weight_ways"}, {"weights.merged_over_adapter"}, marks=pytest.mark.long),
        pytest.param({*PARTS} - {"generate"}, {"generate.tokens_per_second"}, marks=ON_REAL_PAIRS),
        pytest.param({*PARTS} - {"ppo"}, {"ppo.samples_per_second"}, marks=ON_REAL_PAIRS),
    ],
    ids=[
        "all but those that learn",
        "checkpoints",
        "learning",
        "modes of rollout",
        "watching",
        "ways of weights",
        "generate",
        "ppo",
    ],
)
def test_every_part_runs_and_adds_to_the_same_file(tmp_path: Path, left_out: set[str], expected: set[str]) -> None:
    """All but the demo, which is a whole Ray cluster: ``test_demo`` reads what it leaves."""
    path = tmp_path / "figures.json"
    record({"faults.kills": Figure(3.0, "kills", True, "kept from before")}, path)
    parts = ",".join(part for part in PARTS if part not in left_out)
    command = [sys.executable, "-m", "benchmarks.run", "--quick", "--only", parts, "--results", str(path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=root, env={**os.environ})
    assert done.returncode == 0, done.stderr[-3000:]
    figures = stored(path)
    assert set(figures) == {*expected, "faults.kills"} and figures["faults.kills"]["value"] == 3.0
    assert all(figures[name]["method"] for name in expected)
    assert all(figures[name]["value"] > 0 for name in expected - LEARNED), "two steps learn nothing"
    assert {line.split()[0] for line in done.stdout.splitlines() if line.strip()} >= expected
