"""Part ``watching``: what it costs a run, and a scoring service, that they are watched.

Invariants: the job is that of ``rollout_modes`` in ``sync``, on two cores, with and without, in turns (``turns``); with it come
spans of every process, the metrics on Ray's page, and a follower that feeds TensorBoard and a file of JSON lines. Both
sample the same tokens, so each step is compared with the same step of the other side. Alarms cannot
be switched off, so that both sides have them: a look is measured by itself, with all that is remembered of a run whose steps
take one second. A request to the service has no model behind, so that its share is the largest that there is; it is taken in
seconds of the processor, with and without metrics in turns, and the clients are another process.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from unittest.mock import patch

from prometheus_client import Counter, Histogram

from benchmarks import turns
from benchmarks.figures import Figure, Figures
from benchmarks.rollout_modes import QUICK, REWARD, SIZES, SKIPPED, run, settings
from benchmarks.sequences import ragged_sequences
from benchmarks.service.load import Order
from benchmarks.service.load import run as load
from benchmarks.service.reward_service import VOCABULARY, Instant, bodies, load_group, role_of, save_model, serving
from benchmarks.turns import Step
from rlhf_ray.config.loading import load_config
from rlhf_ray.evaluation.intervals import mean_interval
from rlhf_ray.monitoring.phases import PhaseClock
from rlhf_ray.rewards.batcher import Waiting
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.serving.metrics import Metrics
from rlhf_ray.trainers.alarm_watch import EVERY_S, REMEMBERED_S, AlarmWatch

STEPS = 60
ANSWERS = SIZES["prompts_per_step"] * SIZES["samples_per_prompt"]
AT_THE_START = 2 * 4 + ANSWERS
"""Answers that get a reward before the first step: those of the evaluation, and of the check that an answer has the same reward
by itself and among others."""
WITH = ["monitoring.spans=true", "monitoring.ray_metrics=true"]
WITHOUT = ["monitoring.spans=false", "monitoring.ray_metrics=false", "monitoring.trackers=[]"]
TURNS, REQUESTS, CLIENTS = 7, 4000, 64
LOOKS = 200
"""Among which are two that forget what is too old."""


def measure(quick: bool = False) -> Figures:
    """How much longer a step takes, and how much of a core the alarms do."""
    plain, watched, lines = side_by_side(quick)
    together, processor_share = share_of_a_step(plain, watched)
    low, high = mean_interval([other.seconds / one.seconds - 1.0 for one, other in zip(plain, watched, strict=True)])
    look_s = seconds_of_a_look(lines[-1])
    requests = REQUESTS // 10 if quick else REQUESTS
    request_s, bare_s = seconds_of_a_request(requests)
    scored_s = seconds_of_a_scored_request(requests // 10)
    return {
        "watching.share_of_a_request": Figure(
            (request_s - bare_s) / scored_s, "share", False,
            f"processor seconds that metrics take of those of a request of one item: {(request_s - bare_s) * 1e6:.0f} of "
            f"{scored_s * 1e6:.0f} microseconds with a Llama of 14M parameters behind, bf16, one thread, of {bare_s * 1e6:.0f} "
            f"with no model; the first is a difference of medians: {TURNS} turns of {requests} requests from {CLIENTS} clients",
        ),
        "watching.share_of_a_step": Figure(
            together, "share", False,
            f"GRPO of a Llama of 14M parameters with spans, Ray's metrics and two trackers against without: two runs that take "
            f"turns at their steps, each step beside the same one of the other run; median of {len(plain)} pairs, a step takes "
            f"{median(step.seconds for step in plain):.3f} s; in processor seconds of all processes, those of waiting "
            f"for the other run included, {processor_share:+.2%}; the mean of all pairs lies within {low:+.2%} and {high:+.2%} "
            "(95 %)",
        ),
        "watching.alarms_share_of_a_core": Figure(
            look_s / EVERY_S, "share", False,
            f"{look_s * 1e3:.1f} ms of processor time for a look every {EVERY_S:g} s with {REMEMBERED_S:g} steps remembered, "
            f"mean of {LOOKS}; what is told to Ray is in the other figure",
        ),
    }  # fmt: skip


def side_by_side(quick: bool) -> tuple[list[Step], list[Step], list[dict[str, float]]]:
    """The steps of a run without and of one with, which take turns; and the metrics of the second."""
    with TemporaryDirectory() as name, ThreadPoolExecutor(2) as pool:
        root, names, steps = Path(name), ("plain", "watched"), 4 if quick else STEPS
        trackers = f"monitoring.trackers=[jsonl:{root}/run.jsonl,tensorboard]"
        started = [
            pool.submit(
                run, "sync", [*overrides, *(QUICK if quick else []), f"steps={steps}"],
                turns.program(root, own, other, first=AT_THE_START, answers=ANSWERS, turns=steps - 1),
            )
            for overrides, own, other in zip((WITHOUT, [*WITH, trackers]), names, reversed(names), strict=True)
        ]  # fmt: skip
        plain_lines, watched_lines = (one.result() for one in started)
        for one, other in zip(plain_lines, watched_lines, strict=True):
            if one["length/response"] != other["length/response"]:
                raise AssertionError(
                    f"step {one['step']:g} sampled other tokens on each side: its times cannot be compared"
                )
        plain, watched = (turns.steps(root, own)[0 if quick else SKIPPED : -1] for own in names)
    return plain, watched, watched_lines


def share_of_a_step(plain: Sequence[Step], watched: Sequence[Step]) -> tuple[float, float]:
    """By how much a step with is longer than the same one without, as a share: in the median, and in processor seconds."""
    longer = median(other.seconds / one.seconds for one, other in zip(plain, watched, strict=True))
    more = sum(step.processor_s for step in watched) / sum(step.processor_s for step in plain)
    return longer - 1.0, more - 1.0


class Nothing(Metrics):
    """Metrics that note nothing."""

    def __init__(self) -> None:
        super().__init__()
        for name, one in vars(self).items():
            if isinstance(one, (Counter, Histogram)):
                setattr(self, name, self)

    def labels(self, *_: object) -> Nothing:
        """Itself."""
        return self

    def inc(self, *_: object) -> None:
        """Nothing."""

    def observe(self, *_: object) -> None:
        """Nothing."""

    def batch(self, waiting: Sequence[Waiting], now: float) -> None:
        """Nothing."""

    def forward(self, model: str, *, items: int, tokens: int, seconds: float) -> None:
        """Nothing."""


def seconds_of_a_request(requests: int) -> tuple[float, float]:
    """Processor seconds of the service for a request, with metrics and without."""
    seconds: dict[bool, list[float]] = {False: [], True: []}
    role, sent = role_of(Path("none"), threads=1), bodies([[1, 2, 3]] * requests, 1)
    with ExitStack() as stack:
        both = {
            watched: stack.enter_context(serving(role, lambda _: Instant(), metrics))
            for watched, metrics in ((True, Metrics()), (False, Nothing()))
        }
        for number in range(TURNS + 1):
            for watched, service in both.items():
                began = time.process_time()
                outcome = load(Order(service.host, service.port, "/v1/reward", sent, CLIENTS))
                if outcome.count(200) != requests:
                    raise AssertionError(f"requests failed: {sorted(set(outcome.statuses))}")
                if number > 0:  # the first turn warms up
                    seconds[watched].append((time.process_time() - began) / requests)
    return median(seconds[True]), median(seconds[False])


def seconds_of_a_scored_request(requests: int) -> float:
    """Processor seconds of the service for a request of one item that a model scores."""
    sent = bodies([sequence.tolist() for sequence in ragged_sequences(requests, VOCABULARY)], 1)
    with TemporaryDirectory() as name:
        role = role_of(save_model(Path(name) / "model", "llama-14m"), threads=1)
        with serving(role, load_group(role, max_batch_tokens=8192)) as service:
            for _ in range(2):  # the first warms up
                began = time.process_time()
                load(Order(service.host, service.port, "/v1/reward", sent, CLIENTS))
            return (time.process_time() - began) / requests


def seconds_of_a_look(line: dict[str, float]) -> float:
    """The mean processor seconds of a look at a run whose every step had these metrics and took a second."""
    with TemporaryDirectory() as name:
        root = Path(name)
        directory = RunDirectory.create(root / "run", "kind: ppo\n")
        (root / "reward.py").write_text(REWARD)
        (root / "config.json").write_text(json.dumps(settings(root, "sync")))
        watch = AlarmWatch(directory, load_config(root / "config.json", [], kind="ppo"), PhaseClock())
        now = time.time()
        with patch("time.time") as clock:
            for step in range(1, int(REMEMBERED_S) + 1):
                clock.return_value = now - REMEMBERED_S + step
                watch.log(step, {**line, "step": float(step)})
        began = time.thread_time()
        for _ in range(LOOKS):
            watch.look()
        took = time.thread_time() - began
        directory.release()
    return took / LOOKS
