"""The closed form of mean staleness agrees with a simulation of events that asks the modes' own state machine."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks.figures import REFERENCE
from rlhf_ray.config.loading import load_config
from rlhf_ray.planning.staleness import mean_staleness, staleness_table
from rlhf_ray.trainers.ppo.modes.window import Window

TINY_PPO = Path(__file__).parents[1] / "e2e" / "ppo_tiny.yaml"
STEPS, WARM_UP, PROMPTS = 200, 40, 24


class Fleet:
    """Places in which one prompt each is sampled, and what is published meanwhile, event by event."""

    def __init__(self, window: int, places: int, latency: Callable[[], float]) -> None:
        self.queue: Window[int] = Window(steps=window, size=PROMPTS, total=STEPS, step=0)
        self.free = places
        self.latency = latency
        self.ends: list[tuple[float, int, int]] = []
        """When the prompts in work end, their numbers, and the versions that sampled their first tokens."""
        self.version = 0

    def begin(self, now: float) -> None:
        while self.free and (number := self.queue.next()) is not None:
            self.free -= 1
            heapq.heappush(self.ends, (now + self.latency(), number, self.version))

    def end_next(self) -> float:
        now, number, version = heapq.heappop(self.ends)
        self.queue.finish(number, version)
        self.free += 1
        return now

    def sample_until(self, now: float) -> None:
        while self.ends and self.ends[0][0] <= now:
            self.begin(self.end_next())

    def drain(self, now: float) -> float:
        while self.ends:
            now = self.end_next()
        return now


def simulated(
    window: int, places: int, sampling_s: float, *, noise: float = 0.0, partial: bool
) -> tuple[list[float], list[float]]:
    """The mean age of each step's answers, and at each publication the steps of answers that were begun and not learned from.

    Learning takes a second. A place samples a prompt in the time in which the places together sample a step in ``sampling_s``;
    ``noise`` is the spread of that time and of learning, over their means. Without ``partial`` a publication waits for what is
    in work.
    """
    random = np.random.default_rng(3)

    def draw(mean: float) -> float:
        return mean if noise == 0.0 else float(random.gamma(noise**-2, mean * noise**2))

    fleet = Fleet(window, places, lambda: draw(sampling_s * places / PROMPTS))
    ages: list[float] = []
    waiting: list[float] = []
    now = 0.0
    for _ in range(STEPS):
        fleet.begin(now)
        while not fleet.queue.ready():
            now = fleet.end_next()
            fleet.begin(now)
        versions = fleet.queue.take()
        ages.append(float(np.mean([fleet.version - version for version in versions])))
        fleet.begin(now)
        now += draw(1.0)
        fleet.sample_until(now)
        if not partial:
            now = fleet.drain(now)
        waiting.append(sum(fleet.queue.counts()) / PROMPTS)
        fleet.version += 1
    return ages[WARM_UP:], waiting[WARM_UP:]


CASES = [
    (1, 24, 2.0),
    (1, 6, 2.5),
    (2, 6, 0.5),
    (2, 6, 1.7),
    (2, 12, 3.0),
    (3, 24, 0.7),
    (3, 12, 4.0),
    (4, 6, 1.3),
    (2, 1, 5.0),
]
"""Windows, places, and how long a step takes the places together."""


def longest(places: int, sampling_s: float, noise: float) -> float:
    """The time of the prompt that a step waits for over the mean: they are begun one after the other, and any may be last."""
    if noise == 0.0:
        return 1.0
    mean, before_the_last = sampling_s * places / PROMPTS, np.arange(PROMPTS) * sampling_s / PROMPTS
    drawn = np.random.default_rng(5).gamma(noise**-2, mean * noise**2, (4000, PROMPTS))
    return float((drawn - before_the_last).max(axis=1).mean() / mean)


def closed(window: int, places: int, sampling_s: float, noise: float) -> float:
    sizes = {"in_work": places / PROMPTS, "longest": longest(places, sampling_s, noise)}
    return mean_staleness("windowed", steps=STEPS, window=window, sampling_s=sampling_s, learning_s=1.0, **sizes)


@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize(("window", "places", "sampling_s"), CASES)
def test_no_age_is_above_the_window_and_the_mean_is_that_of_what_was_begun_at_publications(
    window, places, sampling_s, partial
) -> None:
    """Little's law: every answer of age a was begun and not learned from at a publications."""
    ages, waiting = simulated(window, places, sampling_s, noise=0.6, partial=partial)
    assert max(ages) <= window and closed(window, places, sampling_s, 0.6) <= window
    assert np.mean(ages) == pytest.approx(np.mean(waiting), rel=0.02)


@pytest.mark.parametrize("partial", [True, False])
@pytest.mark.parametrize(
    ("noise", "window", "places", "sampling_s"),
    [(0.1, *case) for case in CASES] + [(0.6, *case) for case in CASES if case[2] != 1.3],  # as long as learning takes
)
def test_the_closed_form_is_within_a_fifth_of_the_mean(window, places, sampling_s, noise, partial) -> None:
    ages, _ = simulated(window, places, sampling_s, noise=noise, partial=partial)
    assert np.mean(ages) == pytest.approx(closed(window, places, sampling_s, noise), rel=0.2)


@pytest.mark.parametrize("window", [1, 2, 3])
def test_engines_that_keep_up_or_sample_everything_at_once_fill_the_window(window) -> None:
    assert mean_staleness("windowed", steps=9, window=window, sampling_s=1.0, in_work=0.1) == window
    assert mean_staleness("windowed", steps=9, window=window, sampling_s=50.0) == window


def test_the_mean_of_a_measured_run_is_within_a_fifth_of_the_closed_form() -> None:
    """A run on Ray with a vLLM engine that never pauses; ``make bench ONLY=rollout_modes`` measures it again."""
    figures = json.loads(REFERENCE.read_text())["figures"]
    assert figures["ppo.staleness_vs_closed_form"]["value"] == pytest.approx(1.0, rel=0.2)


def test_modes_in_which_times_do_not_matter() -> None:
    for seconds in (0.1, 1.0, 30.0):
        assert mean_staleness("sync", steps=9, sampling_s=seconds) == 0.0
        assert mean_staleness("one_step_off", steps=4, sampling_s=seconds) == np.mean([0, 1, 1, 1])
    with pytest.raises(ValueError, match="learning_s is 0, but it must be above 0"):
        mean_staleness("sync", steps=1, learning_s=0.0)


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
