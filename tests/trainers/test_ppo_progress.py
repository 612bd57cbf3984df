"""What the driver remembers between two steps comes back from a checkpoint as it was."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.actors.groups import Group
from rlhf_ray.config.sections.algorithm import KlConfig
from rlhf_ray.engine.report import Applied, Report
from rlhf_ray.models.devices import GpuPeak
from rlhf_ray.pending import Pending
from rlhf_ray.trainers.ppo.progress import PpoProgress
from rlhf_ray.trainers.ppo.update import StepOutcome
from rlhf_ray.trajectories.batch import TrajectoryBatch

ADAPTIVE = KlConfig(coefficient=0.1, target=6.0, horizon=100)
STEPS = st.lists(st.tuples(st.floats(0, 30), st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=4)), max_size=5)


def batch_of(scores: list[float]) -> TrajectoryBatch:
    return TrajectoryBatch.from_sequences([[1]] * len(scores), score=scores)


def after(steps: list[tuple[float, list[float]]], progress: PpoProgress) -> PpoProgress:
    for kl, scores in steps:
        progress.observe_scores(batch_of(scores))
        progress.finish_step(StepOutcome(updates=2, skipped=1), {"kl/k1": kl}, sequences=len(scores))
    return progress


@settings(deadline=None, max_examples=30)
@given(steps=STEPS, more=STEPS, config=st.sampled_from([ADAPTIVE, KlConfig()]))
def test_a_restored_run_goes_on_as_if_it_had_never_stopped(steps, more, config) -> None:
    whole = after([*steps, *more], PpoProgress.start(config))
    state = json.loads(json.dumps(after(steps, PpoProgress.start(config)).state()))
    resumed = PpoProgress.start(config)
    resumed.restore(state)
    assert after(more, resumed) == whole
    assert resumed.state() == whole.state()


def test_the_coefficient_follows_the_kl_and_stands_still_without_one() -> None:
    progress = PpoProgress.start(ADAPTIVE)
    objectives: list[dict[str, Any]] = [{"kl/k1": 12.0}, {"kl/k1": 1.0}, {}, {"kl/k1": math.nan}]
    coefficients = []
    for objective in objectives:
        progress.finish_step(StepOutcome(updates=1), objective, sequences=50)
        coefficients.append(progress.metrics()["kl/coefficient"])
    assert coefficients == pytest.approx([0.11, 0.099, 0.099, 0.099])
    assert PpoProgress.start(KlConfig()).metrics()["kl/coefficient"] == 0.05


def test_moments_are_those_of_every_score_as_it_came() -> None:
    progress = after([(0.0, [1.0, 3.0]), (0.0, [5.0])], PpoProgress.start(KlConfig()))
    every = torch.tensor([1.0, 3.0, 5.0])
    assert progress.moments.mean == pytest.approx(3.0)
    assert progress.moments.deviation == pytest.approx(every.std(correction=0).item())


def test_the_gpu_memory_of_a_step_is_its_largest_peak_and_a_step_on_the_cpu_has_none() -> None:
    """A skipped update took memory too."""
    outcome, report = StepOutcome(), Report(True, 0.0, {})
    for allocated, skipped in ((2.0, False), (5.0, True), (1.0, False)):
        peak = GpuPeak(allocated, allocated + 1.0)
        norm = None if skipped else 1.0
        outcome.add(
            {"policy": report},
            {"policy": Applied(skipped, norm, 0.1, 1, peak), "critic": Applied(skipped, norm, 0.1, 1)},
        )
    gpu = {name: value for name, value in outcome.metrics.items() if name.startswith("memory/")}
    assert gpu == {"memory/gpu_allocated_gb/policy": 5.0, "memory/gpu_reserved_gb/policy": 6.0}


def test_the_gpu_memory_of_a_group_is_that_of_its_fullest_gpu() -> None:
    class Ranks:
        role, size = "policy", 3

        def call(self, *_: object, **__: object) -> Pending[list[Applied]]:
            return Pending.done([Applied(False, 1.0, 0.1, 1, GpuPeak(1.0, held)) for held in (2.0, 4.0, 3.0)])

    assert Group(Ranks()).apply(skip=False).result().gpu == GpuPeak(1.0, 4.0)  # type: ignore[arg-type]  # one call is enough
