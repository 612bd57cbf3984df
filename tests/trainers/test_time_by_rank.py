"""A run says by itself where its time went: in its metrics, in its report, and in a trace for a viewer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.cli.main import main
from rlhf_ray.monitoring.spans.critical_path import critical_path
from rlhf_ray.monitoring.spans.lanes import OUTSIDE, WORK, driver_pieces, lane_pieces
from rlhf_ray.monitoring.spans.reading import SpanFiles
from rlhf_ray.monitoring.spans.records import Attempt
from rlhf_ray.runs.directory import RunDirectory
from tests.trainers.small_runs import config_of, signals_as_before, train

SECRET = "canary-7f3a"
ROLES = {"policy", "reference", "reward", "rollout"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    root = tmp_path_factory.mktemp("spans")
    with signals_as_before(), pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_API_KEY", SECRET)
        return train(config_of("ppo", root, "monitoring.open_telemetry=true"))


@pytest.fixture(scope="module")
def attempt(run: RunDirectory) -> Attempt:
    (one,) = SpanFiles(run.spans).read().attempts()
    return one


def test_the_critical_path_in_the_metrics_is_as_long_as_the_step(run: RunDirectory) -> None:
    lines = [line for line in run.metrics.read() if "time/step" in line]
    measured = [line for line in lines if any(name.startswith("critical_path/") for name in line)]
    assert measured and measured[0]["step"] == 1
    for line in measured:
        path = {name: value for name, value in line.items() if name.startswith("critical_path/")}
        assert sum(path.values()) == pytest.approx(line["time/step"], rel=0.02)
        assert {f"critical_path/{role}" for role in ("driver", "policy", "rollout")} <= path.keys()
        idle = {name.removeprefix("idle/"): value for name, value in line.items() if name.startswith("idle/")}
        assert idle.keys() == ROLES and all(0 < share < 1 for share in idle.values())


def test_the_lanes_of_all_ranks_are_accounted_for_from_begin_to_end(attempt: Attempt) -> None:
    """Work is what the rank answered; each wait has the name of a call, a phase or the start."""
    driver = driver_pieces(attempt.driver, attempt.began, attempt.until)
    whole, steps = attempt.until - attempt.began, attempt.steps()
    begin, end = steps[0].begin, steps[-1].end
    assert attempt.lanes().keys() == {f"{role}/0" for role in ROLES}
    for lives in attempt.lanes().values():
        pieces = lane_pieces(lives, driver, attempt.began, attempt.until)
        assert sum(piece.length for piece in pieces) == whole
        nameless = [piece for piece in pieces if OUTSIDE in piece.name]
        assert sum(piece.length for piece in nameless) < 0.1 * whole
        in_steps = sum(min(piece.end, end) - max(piece.begin, begin) for piece in nameless
                       if piece.begin < end and piece.end > begin)  # fmt: skip
        assert in_steps < 0.02 * (end - begin) + 25_000, (
            "what is done for the first time weighs in a step of half a second"
        )
        assert {piece.name for piece in pieces if piece.kind == WORK}
    waited_for = {
        piece.name for piece in lane_pieces(attempt.lanes()["rollout/0"], driver, attempt.began, attempt.until)
    }
    assert {"policy.accumulate", "reward.score", "driver: start"} <= waited_for


def test_each_phase_call_weight_update_and_reward_batch_is_a_span(attempt: Attempt) -> None:
    phases = {span.name for span in attempt.driver if span.kind == "phase"}
    assert {"start", "rollout", "scoring", "log_probs", "update", "weights", "checkpoint", "evaluation"} <= phases
    calls = {f"{span.role}.{span.name}" for span in attempt.calls()}
    assert {
        "policy.setup", "policy.accumulate", "policy.apply", "policy.publish_weights", "rollout.generate", "rollout.receive",
        "reward.score",
    } <= calls  # fmt: skip
    assert [step.number for step in attempt.steps()] == [1, 2]
    assert all(span.finished and not span.failed for span in attempt.driver)
    for step, cut in attempt.by_step():
        assert sum(part.length for part in critical_path(cut, step.begin, step.end)) == step.end - step.begin


def test_the_trace_nests_and_shows_every_lane(run: RunDirectory, tmp_path: Path) -> None:
    output = tmp_path / "trace.json"
    assert main(["trace", str(run.path), "--output", str(output)]) == 0
    events: list[dict[str, Any]] = json.loads(output.read_text())["traceEvents"]
    lanes = {event["args"]["name"] for event in events if event["name"] == "process_name"}
    assert lanes == {"driver", "critical path", *(f"{role}/0" for role in ROLES)}
    tracks: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for event in events:
        if event["ph"] == "X":
            assert event["ts"] >= 0 and event["dur"] >= 0
            tracks.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in tracks.values():
        above: list[float] = []
        for begin, end in sorted(spans, key=lambda one: (one[0], -one[1])):
            while above and above[-1] <= begin:
                above.pop()
            assert not above or end <= above[-1], "a viewer shows events that overlap without nesting as nonsense"
            above.append(end)


def test_a_trace_of_one_step_holds_that_step_alone(run: RunDirectory, tmp_path: Path, capsys) -> None:
    output = tmp_path / "step.json"
    assert main(["trace", str(run.path), "--steps", "2", "--output", str(output)]) == 0
    events = json.loads(output.read_text())["traceEvents"]
    assert {event["args"]["step"] for event in events if "step" in event.get("args", {})} == {2}
    for steps, said in (("9-10", "steps 1 to 2 are"), ("2-1", "in their order"), ("all", "write it as 7 or as 10-12")):
        assert main(["trace", str(run.path), "--steps", steps, "--output", str(tmp_path / "no.json")]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "no.json").exists()


def test_the_report_says_why_the_slowest_step_was_slow(run: RunDirectory) -> None:
    page = run.report_path.read_text()
    assert "Why a step was slow" in page and "The slowest recorded step" in page and "critical path" in page
    for lane in ("driver", "policy/0", "rollout/0"):
        assert f"<b>{lane}</b>" in page


def test_no_secret_is_in_a_span(run: RunDirectory) -> None:
    files = [*run.spans.iterdir(), *run.open_telemetry.iterdir()]
    assert files and not any(SECRET in path.read_text() or "wordy" in path.read_text() for path in files)


def test_a_run_without_spans_has_none_and_says_so(tmp_path: Path, capsys) -> None:
    with signals_as_before():
        run = train(config_of("sft", tmp_path, "monitoring.spans=false"))
    assert not run.spans.exists() and "Why a step was slow" not in run.report_path.read_text()
    assert not any(name.startswith(("idle/", "critical_path/")) for line in run.metrics.read() for name in line)
    assert main(["trace", str(run.path), "--output", str(tmp_path / "trace.json")]) == 2
    assert "monitoring.spans=false" in capsys.readouterr().err
