"""Record a training run: metrics and samples of its steps, its summary, and the report.

Invariants: every metric is in the registry (``monitoring/registry.py``). The line of a step is on disk before the next step
begins. The report can be made again from the run directory alone.
"""

from __future__ import annotations

import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from rlhf_ray.config.jobs.base import TrainingJob
from rlhf_ray.console import SECONDS_BETWEEN_LINES, get_logger, stderr
from rlhf_ray.engine.report import Applied, Report
from rlhf_ray.errors import Interrupted, ResumableStop, RlhfRayError, StorageError
from rlhf_ray.monitoring.memory import Elsewhere, MemorySampler
from rlhf_ray.monitoring.metrics_log import MetricsLog
from rlhf_ray.monitoring.phases import PhaseClock
from rlhf_ray.monitoring.report.summary import (
    BestOf,
    Check,
    Figure,
    MemoryRecord,
    PreferencePage,
    Sample,
    Summary,
    Table,
)
from rlhf_ray.monitoring.spans.figures import StepFigures
from rlhf_ray.monitoring.stalls import seeded
from rlhf_ray.planning.flops import ComputeShape, training_flops
from rlhf_ray.processes import spans
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.runs.reporting import close_run, time_of
from rlhf_ray.trackers.starting import Followed
from rlhf_ray.trainers.alarm_watch import AlarmWatch
from rlhf_ray.trajectories.batch import TrajectoryBatch

CONSOLE_METRICS = (
    "reward/learned",
    "gold/mean",
    "kl/k1",
    "loss/sft",
    "loss/rm",
    "loss/dpo",
    "loss/kto",
    "accuracy",
    "length/response",
    "tokens_per_second",
    "matmul/share",
    "seconds_left",
)
"""Metrics that a step's line on the console shows, where the step has them."""
SECONDS_BETWEEN_MEMORY_SAMPLES = 5.0
"""Not more often: reading the page tables of every process keeps a core busy for a tenth of a second."""
FIRST_LINES = 10
"""So many steps of an attempt are shown at once; from then on one every ten seconds at most where there is no terminal."""
SECONDS_BETWEEN_LOOKS, SHARE_OF_LOOKS = 30.0, 0.01
"""Of the useful time: at most so often, and never more than this share of the time."""


class Journal:
    """Writes the metrics, samples and summary of one run; open it with ``with``."""

    def __init__(
        self,
        run: RunDirectory,
        config: TrainingJob,
        memory_of_ranks: Elsewhere | None = None,
    ) -> None:
        """``memory_of_ranks`` says what ranks hold that need not be descendants of this process."""
        self.run = run
        self.config = config
        self.logger = get_logger(config.kind)
        facts = {"seed": str(config.run.seed), "machine": f"{os.cpu_count()} cores, {platform.machine()}"}
        self._summary: dict[str, Any] = {"facts": facts}
        self._compute: tuple[ComputeShape, float] | None = None
        self._first: tuple[float, int] | None = None
        """When the first update of this attempt, or after going back, ended (monotonic seconds), and its number."""
        self._samples_lost = 0
        self.step = 0
        """The last step whose metrics were logged, in an earlier attempt too."""
        self._said_at = -math.inf
        """When a step was last shown on the console (monotonic seconds)."""
        self._said = 0
        """How many steps of this attempt were."""
        self._next_look = 0.0
        """When the useful time is measured again (monotonic seconds)."""
        self._memory = MemorySampler(interval_s=SECONDS_BETWEEN_MEMORY_SAMPLES, elsewhere=memory_of_ranks)
        recorder = spans.recorder()
        self._spans = None if recorder is None else StepFigures(run.spans, recorder.name)

    def __enter__(self) -> Journal:
        self.run.closing_path.unlink(missing_ok=True)  # of a run that trains on
        self._memory.start()
        exporter, phases = self._exporters()
        self.clock = PhaseClock(None if phases is None else phases.enter)
        self.alarms = AlarmWatch(self.run, self.config, self.clock, tuple(filter(None, (exporter, phases))))
        self._log = MetricsLog(self.run.metrics, [self.alarms] if exporter is None else [self.alarms, exporter])
        lines = self.run.metrics.read()
        self.clock.durations = seeded(lines)
        self.alarms.start()
        self.step = int(lines[-1]["step"]) if lines else 0
        self._followed = Followed(self.run, self.config.monitoring)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.alarms.stop(in_order=error is None or isinstance(error, ResumableStop | Interrupted))
        self._log.close()
        self._memory.stop()
        self._followed.close()
        if self._samples_lost:
            self.logger.warning("the samples of %d steps could not be written", self._samples_lost)

    def _exporters(self) -> tuple[Any, Any]:
        """What sends metrics and phase to Ray; None for both where Ray is not told."""
        if not self._exports_to_ray():
            return None, None
        from rlhf_ray.monitoring.ray_export import PhaseGauge, RayExporter

        return RayExporter(self.config.run.name), PhaseGauge(self.config.run.name)

    def _exports_to_ray(self) -> bool:
        if not self.config.monitoring.ray_metrics:
            return False
        import ray

        return bool(ray.is_initialized())

    def phase(self, name: str, work: str | None = None) -> AbstractContextManager[None]:
        """Time the ``with`` block as ``time/<name>``, and export its name as what the run is doing."""
        return self.clock.phase(name, work)

    def log_step(self, step: int, total: int, metrics: Mapping[str, float], batch: TrajectoryBatch) -> None:
        """Log one step of reinforcement learning; the time since the last step counts as its own."""
        times = self._end_step(step)
        rates = {"tokens_per_second": batch.num_tokens / times["time/step"]}
        seconds = metrics.get("rollout/seconds", times.get("time/rollout"))
        if seconds:
            rates["rollout/tokens_per_second"] = float(batch["action_mask"].sum()) / seconds
        self._write(step, total, {**metrics, **times, **rates})

    def log_update(
        self, update: int, total: int, report: Report, applied: Applied, batch: TrajectoryBatch, *, stood_out: bool
    ) -> None:
        """Log one update of supervised or reward-model training."""
        times = self._end_step(update)
        means = {name: value / count for name, (value, count) in report.metrics.items() if count}
        norm = {} if applied.grad_norm is None else {"grad_norm": applied.grad_norm}
        rates = {"tokens_per_second": batch.num_tokens / times["time/step"], "learning_rate": applied.learning_rate}
        if self._compute is not None:
            shape, rate = self._compute
            rates["matmul/share"] = training_flops(shape, batch.lengths.tolist()) / times["time/step"] / rate
        if applied.gpu is not None:
            rates["memory/gpu_allocated_gb"] = applied.gpu.allocated_gb
            rates["memory/gpu_reserved_gb"] = applied.gpu.reserved_gb
        skipped = {"updates/skipped": float(applied.skipped), "updates/stood_out": float(stood_out)}
        skipped["update"] = float(update)
        self._write(update, total, {**means, **norm, **rates, **skipped, **times, **self._time_left(update, total)})

    def _end_step(self, step: int) -> dict[str, float]:
        """The times of a step that ends now, and what the spans of all processes say of it."""
        began = self.clock.step_began
        times = self.clock.take(step)
        if self._spans is None:
            return times
        with spans.span("metrics"):
            return times | self._spans.measure(round(began * 1e6), round((began + times["time/step"]) * 1e6))

    def measure_against(self, shape: ComputeShape, rate: float) -> None:
        """Log the speed of updates as a share of ``rate``, the FLOP/s of matrix products of all ranks together."""
        self._compute = (shape, rate)
        self.add_facts({"matrix products": f"{rate / 1e9:.0f} GFLOP/s"})

    def _time_left(self, update: int, total: int) -> dict[str, float]:
        """Seconds that the remaining updates will take at the mean pace of this attempt; nothing at its first one."""
        now = time.monotonic()
        if self._first is None or update <= self._first[1]:
            self._first = (now, update)
            return {}
        began, first = self._first
        return {"seconds_left": (now - began) / (update - first) * (total - update)}

    @spans.span("metrics")
    def _write(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        self.step = step
        metrics = {**metrics, **self._useful_time(step, metrics["time/step"])}
        self._log.log(step, {**metrics, "memory/pss_gb": self._memory.latest.total_gb})
        if self._is_said(step, total):
            line = "  ".join(f"{name} {metrics[name]:.3g}" for name in CONSOLE_METRICS if name in metrics)
            self.logger.info("%d/%d  %s", step, total, line)

    def _is_said(self, step: int, total: int) -> bool:
        """Whether the console shows a step: about 100 of a run, and after the first ones no more than a log needs."""
        now = time.monotonic()
        is_soon = now - self._said_at < SECONDS_BETWEEN_LINES and self._said >= FIRST_LINES
        is_due = stderr.is_terminal or not is_soon
        if step not in (1, total) and not (is_due and (total <= 100 or step % (total // 50) == 0)):
            return False
        self._said_at, self._said = now, self._said + 1
        return True

    def _useful_time(self, step: int, seconds: float) -> dict[str, float]:
        """The useful share of the run's time, now and then: the whole record is read for it."""
        began = time.monotonic()
        if began < self._next_look:
            return {}
        now = time.time()
        try:
            share = time_of(self.run, now=now, line={"step": step, "timestamp": now, "time/step": seconds}).share
        except RlhfRayError as error:  # somebody has edited a file meanwhile
            self.logger.warning("the useful time is not measured any more: %s", error)
            self._next_look = math.inf
            return {}
        took = time.monotonic() - began
        self._next_look = began + max(SECONDS_BETWEEN_LOOKS, took / SHARE_OF_LOOKS)
        return {"useful_time": share}

    def log_evaluation(self, step: int, figures: Mapping[str, float], *, headline: bool = True) -> None:
        """Log figures on held-out rows; the last ones with ``headline`` stand at the top of the report."""
        if figures:
            self._log.log(step, figures)
            names = {name: name.removeprefix("evaluation/") for name in figures}
            self.logger.info("held out: %s", "  ".join(f"{names[name]} {value:.4g}" for name, value in figures.items()))
            if headline:
                self._summary["figures"] = tuple(
                    Figure(names[name].replace("_", " "), f"{value:.3f}") for name, value in figures.items()
                )

    def evaluated(self, step: int) -> dict[str, float]:
        """The figures on held-out rows that were logged for a step; empty if it was not evaluated."""
        lines = [line for line in self.run.metrics.read() if line["step"] == step]
        return {
            name: value
            for line in lines
            for name, value in line.items()
            if name.startswith("evaluation/") and value is not None
        }

    @spans.span("samples")
    def write_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write samples of a step as JSON lines, if there are any."""
        if not rows:
            return
        try:
            self.run.write_samples(step, rows)
        except StorageError as error:
            if not self._samples_lost:
                self.logger.warning("the samples of step %d could not be written (%s): training goes on", step, error)
            self._samples_lost += 1

    def keep_checks(self, checks: Sequence[Check]) -> None:
        """Keep results of the self-check for the report, beside those that it has."""
        self._summary["checks"] = (*self._summary.get("checks", ()), *checks)

    def add_facts(self, facts: Mapping[str, str]) -> None:
        """Add facts, by their names, to the top of the report."""
        self._summary["facts"] |= facts

    def keep_preferences(self, page: PreferencePage) -> None:
        """Keep what the report shows of held-out pairs."""
        self._summary["preferences"] = page

    def keep_comparison(self, table: Table, samples: Sequence[Sample], best_of: Sequence[BestOf]) -> None:
        """Keep how the trained model compares with the one that the run started from."""
        self._summary |= {"closing": table, "samples": tuple(samples), "best_of": tuple(best_of)}

    def finish(self) -> Summary:
        """Write the summary and the report."""
        with self.clock.part("report"):
            return self._finish()

    def _finish(self) -> Summary:
        self.add_facts({f"missed by {name}": f"{count} lines of metrics" for name, count in self._log.lost.items()})
        peak = self._memory.last()
        history = tuple((round(at, 1), round(use.total_gb, 3)) for at, use in self._memory.history)
        nodes = {node: round(size, 3) for node, size in peak.by_node.items()}
        memory = MemoryRecord(round(peak.pss_gb, 3), round(peak.object_store_gb, 3), peak.processes, history, nodes)
        summary = Summary(**self._summary, memory=memory)
        self.run.write_closing(summary)
        close_run(self.run, keep_commit=self.config.checkpoint.every_steps != 0)
        self.logger.info("report: %s", self.run.report_path)
        return summary
