"""The part ``demo`` reads its numbers from what a finished demo leaves, and the worst seed is the figure."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from benchmarks.demo import BAG_OF_WORDS, DESCRIPTIONS, figures, read_numbers
from rlhf_ray.config.jobs.sft import SftConfig
from rlhf_ray.config.loading import load_job
from rlhf_ray.monitoring.report.summary import Figure, MemoryRecord, Summary

LAST = {"evaluation/gold": 0.9, "evaluation/gold_start": 0.5, "evaluation/gold_win_rate": 0.88, "evaluation/kl": 1.5}


def finished_demo(root: Path, memory: MemoryRecord | None) -> None:
    """Writes what the demo's reward model and PPO runs leave of their figures."""
    lines: dict[str, list[dict[str, Any]]] = {
        "rm": [{"step": 1, "evaluation/accuracy": 0.7}, {"step": 2, "evaluation/accuracy": 0.97}],
        "ppo": [{"step": 20, **dict.fromkeys(LAST, 0.1)}, {"step": 40, **LAST}, {"step": 40, "reward/mean": 1.0}],
    }
    for job, rows in lines.items():
        (root / job).mkdir(parents=True)
        (root / job / "metrics.jsonl").write_text("".join(json.dumps({"timestamp": 1.0, **row}) + "\n" for row in rows))
    best_of = [{"n": n, "kl": kl, "gold": 0.6, "win_rate": n / 10} for n, kl in ((2, 0.19), (4, 0.64), (8, 1.7))]
    (root / "ppo" / "evaluation").mkdir()
    (root / "ppo" / "evaluation" / "start.json").write_text(json.dumps({"answers": [], "best_of": best_of}))
    summary = Summary(figures=(Figure("time", "240 s"), Figure(BAG_OF_WORDS, "0.587")), memory=memory)
    (root / "ppo" / "summary.json").write_text(summary.to_json())


def test_numbers_are_those_of_the_last_evaluation(tmp_path: Path) -> None:
    finished_demo(tmp_path, MemoryRecord(3.0, 1.5, 14))
    assert read_numbers(tmp_path) == {
        "demo.reward_accuracy": 0.97,
        "demo.bag_of_words_accuracy": 0.587,
        "demo.sft_gold_mean": 0.5,
        "demo.gold_mean": 0.9,
        "demo.gold_win_rate": 0.88,
        "demo.kl": 1.5,
        "demo.best_of_n.gold_win_rate": 0.4,
        "demo.best_of_n.kl": 0.64,
        "demo.best_of_n.samples": 4.0,
        "demo.memory_gb": 4.5,
    }


def test_a_demo_that_did_not_finish_has_no_figures(tmp_path: Path) -> None:
    finished_demo(tmp_path, None)
    with pytest.raises(ValueError, match="the demo did not finish"):
        read_numbers(tmp_path)


def test_the_label_of_the_baseline_is_the_one_that_the_demo_writes() -> None:
    import rlhf_ray.launch.demo as demo

    assert f'"{BAG_OF_WORDS}"' in Path(demo.__file__).read_text()


def test_the_report_is_written_before_the_cluster_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster that has died may take the process along when it is left."""
    import rlhf_ray.launch.demo as demo
    from rlhf_ray.actors.cluster import Cluster

    events: list[str] = []
    monkeypatch.setattr(Cluster, "__enter__", lambda self: self)
    monkeypatch.setattr(Cluster, "__exit__", lambda *_: events.append("left"))
    monkeypatch.setattr(demo, "new_run", lambda config: nullcontext(None))
    monkeypatch.setattr(demo, "run_trainer", lambda *_: None)
    monkeypatch.setattr(demo, "words_baseline", lambda config: 0.5)
    monkeypatch.setattr(demo, "finish", lambda *_: events.append("reported"))
    monkeypatch.setattr(demo, "job_config", lambda *_: load_job(SftConfig, "demo-sft", []))
    demo.demo(tmp_path, 0, [])
    assert events == ["reported", "left"]


def test_all_seeds_are_kept_and_the_worst_is_the_value() -> None:
    seeds = [dict.fromkeys(DESCRIPTIONS, 0.25 * seed) for seed in (1, 2, 3)]
    measured = figures(seeds)
    assert set(measured) == set(DESCRIPTIONS)
    assert measured["demo.gold_win_rate"].value == 0.25 and measured["demo.kl"].value == 0.75
    assert measured["demo.kl"].seeds == (0.25, 0.5, 0.75)
