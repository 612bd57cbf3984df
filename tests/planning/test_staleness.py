"""The closed form of mean staleness agrees with a simulation of events that asks the modes' own state machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from rlhf_ray.config.loading import load_config
from rlhf_ray.config.sections.rollout import RolloutConfig
from rlhf_ray.planning.staleness import mean_staleness, slices_of, staleness_table
from rlhf_ray.trainers.ppo.modes.window import Slice, Window

TINY_PPO = Path(__file__).parents[1] / "e2e" / "ppo_tiny.yaml"
STEPS, WARM_UP, SLICE = 400, 100, 8


class Times:
    """Seconds of slices and of learning: all alike, or drawn from gamma distributions with a spread of ``noise``."""

    def __init__(self, sampling_s: float, learning_s: float, slices: int, noise: float) -> None:
        self.mean = {"slice": sampling_s / slices, "learn": learning_s}
        self.noise, self.random = noise, np.random.default_rng(3)

    def of(self, what: str) -> float:
        if self.noise == 0.0:
            return self.mean[what]
        return float(self.random.gamma(self.noise**-2, self.mean[what] * self.noise**2))


def simulated(window: int, slices: int, times: Times) -> tuple[list[list[int]], list[int]]:
    """Ages of the slices of each step, and at each publication the slices that were begun and not learned from.

    Event by event: a slice is sampled with the weights published when it begins; a publication waits for the slice under way.
    """
    queue: Window[int] = Window(steps=window, size=SLICE * slices, total=STEPS, step=0)
    ages: list[list[int]] = []
    waiting: list[int] = []
    now = engine_free = 0.0
    begun: tuple[Slice, int, float] | None = None

    def sample_until(time: float) -> None:
        """Begin and finish slices; one that ends after ``time`` stays under way."""
        nonlocal begun, engine_free
        while True:
            if begun is not None:
                one, version, end = begun
                if end > time:
                    return
                queue.finish(one, version)
                engine_free, begun = end, None
            found = queue.next(SLICE) if engine_free < time else None
            if found is None:
                engine_free = max(engine_free, time)
                return
            begun = (found, len(ages), engine_free + times.of("slice"))

    for _ in range(STEPS):
        while not queue.ready():  # the trainer waits for its answers
            now = max(now, engine_free) if begun is None else begun[2]
            sample_until(now if begun is not None else now + 1e-9)
        versions = [version for _, version in queue.take()]
        version = len(ages)
        end = now + times.of("learn")
        sample_until(end)
        ages.append([version - old for old in versions])
        now = end if begun is None else begun[2]
        if begun is not None:
            one, old, finished = begun
            queue.finish(one, old)
            engine_free, begun = finished, None
        engine_free = max(engine_free, now)
        under_way, ready = queue.counts()
        waiting.append((under_way + ready) // SLICE)
    return ages, waiting


CASES = [(1, 0.6), (1, 2.5), (2, 0.5), (2, 1.7), (3, 0.7), (3, 4.0), (4, 1.3)]


@pytest.mark.parametrize(("window", "sampling_s"), CASES)
@pytest.mark.parametrize("slices", [1, 4])
def test_the_mean_is_exact_where_all_steps_take_the_same_times(window, sampling_s, slices) -> None:
    ages, waiting = simulated(window, slices, Times(sampling_s, 1.0, slices, noise=0.0))
    settled = [age for step in ages[WARM_UP:] for age in step]
    mean = mean_staleness("windowed", steps=STEPS, window=window, sampling_s=sampling_s, learning_s=1.0, slices=slices)
    assert np.mean(settled) == pytest.approx(mean, abs=1e-9)
    assert max(settled) <= window and mean <= window
    # Little's law: every answer of age a was begun and not learned from at a publications
    assert np.mean(settled) == pytest.approx(np.mean(waiting[WARM_UP:-window]) / slices, rel=0.02)


@pytest.mark.parametrize(("window", "sampling_s"), [(1, 0.6), (2, 0.5), (3, 0.6), (1, 2.5), (3, 3.2), (4, 3.0)])
def test_the_mean_is_within_a_fifth_where_times_vary(window, sampling_s) -> None:
    ages, _ = simulated(window, 4, Times(sampling_s, 1.0, 4, noise=0.3))
    settled = [age for step in ages[WARM_UP:] for age in step]
    mean = mean_staleness("windowed", steps=STEPS, window=window, sampling_s=sampling_s, learning_s=1.0)
    assert np.mean(settled) == pytest.approx(mean, rel=0.2)


def test_modes_in_which_times_do_not_matter() -> None:
    for seconds in (0.1, 1.0, 30.0):
        assert mean_staleness("sync", steps=9, sampling_s=seconds) == 0.0
        assert mean_staleness("one_step_off", steps=4, sampling_s=seconds) == np.mean([0, 1, 1, 1])
    with pytest.raises(ValueError, match="learning_s is 0, but it must be above 0"):
        mean_staleness("sync", steps=1, learning_s=0.0)


@pytest.mark.parametrize(("prompts", "engines", "slices"), [(64, 1, 4), (64, 30, 3), (7, 2, 4), (3, 8, 1), (5, 1, 3)])
def test_a_step_has_as_many_slices_as_the_mode_cuts(prompts, engines, slices) -> None:
    rollout = RolloutConfig(engines=engines)
    window: Window[None] = Window(steps=1, size=prompts, total=1, step=0)
    count = 0
    while window.next(rollout.prompts_per_slice(prompts)) is not None:
        count += 1
    assert slices_of(rollout, prompts) == count == slices


@pytest.mark.parametrize(
    ("mode", "line"),
    [("sync", ["mean age of answers", "0.00", "at most 0, in mode sync"]),
     ("one_step_off", ["mean age of answers", "0.50", "at most 1, in mode one_step_off"]),
     ("windowed", ["mean age of answers", "up to 2", "at most 2, in mode windowed"])],
)  # fmt: skip
def test_plan_says_the_age_by_the_mode(mode, line) -> None:
    changes = [f"rollout.mode={mode}", "steps=2", "run.deterministic=false"]
    text = staleness_table(load_config(TINY_PPO, changes, kind="ppo"), lambda model: (model, {})) or ""
    assert all(word in text for word in line), text
