"""A run directory as a run of 12 steps leaves it that is killed after step 9, and goes on from the commit of step 6."""

from __future__ import annotations

from pathlib import Path

from rlhf_ray import storage
from rlhf_ray.config.loading import dump_config, load_config
from rlhf_ray.monitoring.report.summary import Summary
from rlhf_ray.runs.directory import RunDirectory

BEGAN = 1.7e9


class SmallRun:
    """Writes what a trainer writes. The values of a step say in which attempt it was made."""

    def __init__(self, root: Path, *overrides: str, name: str = "small") -> None:
        config = load_config("demo-sft", [f"run.root={root}", f"run.name={name}", *overrides])
        self.run = RunDirectory.create(root / name, dump_config(config))
        self.now = BEGAN
        self._set_start()

    def _set_start(self) -> None:
        self.now += 1.0
        self.run.attempts.amend_last({"timestamp": self.now})

    def log(self, *steps: int) -> None:
        for step in steps:
            self.now += 1.0
            loss = self.run.attempt + step / 100
            self.run.metrics.append({"step": step, "timestamp": self.now, "loss/sft": loss, "grad_norm": None})

    def evaluate(self, step: int) -> None:
        self.now += 0.5
        self.run.metrics.append({"step": step, "timestamp": self.now, "evaluation/loss": step / 10})

    def commit(self, step: int) -> None:
        pending = self.run.checkpoints.begin(step)
        storage.write_file(pending.path / "shard", "weights")
        self.run.checkpoints.commit(pending, {"state": {}})

    def crash(self) -> None:
        self.run.release()

    def go_on(self) -> None:
        self.run, _ = RunDirectory.resume(self.run.path)
        self._set_start()

    def finish(self) -> None:
        self.run.write_summary(Summary())
        self.run.release()


def crashed_at_9(root: Path, *overrides: str) -> SmallRun:
    small = SmallRun(root, *overrides)
    small.log(1, 2, 3, 4, 5, 6)
    small.evaluate(6)
    small.commit(6)
    small.log(7, 8, 9)
    small.crash()
    return small


def ended_at_12(small: SmallRun) -> None:
    small.go_on()
    small.log(7, 8, 9, 10, 11, 12)
    small.commit(12)
    small.evaluate(12)
    small.finish()


EXPECTED = {step: (1 if step <= 6 else 2) + step / 100 for step in range(1, 13)}
"""``loss/sft`` of each step in one curve without what the resume has undone."""
EXPECTED_EVALUATIONS = {6: 0.6, 12: 1.2}
