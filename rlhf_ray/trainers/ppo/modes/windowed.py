"""The mode ``windowed``: the engines sample up to ``rollout.window`` steps ahead of the one that learns.

Invariants:

- What may be begun, and which answers a step gets, is :class:`Window`'s to say; no answer is older than ``rollout.window``.
- One background thread samples a slice of prompts at a time, each with one version of the weights. Weights are published, and
  others use the engines, between two slices, after :meth:`Windowed.settle` and before the next :meth:`Windowed.collect`.
- A checkpoint holds every finished slice of steps to come, with the versions of its tokens, and the position of the prompts
  before the next step. Prompts whose answers are not finished are taken again and sampled by the weights of the checkpoint.

How many prompts a slice has when is a matter of time, so this mode does not repeat bit for bit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.console import get_logger
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.errors import StaleWeightsError
from rlhf_ray.trainers.ppo.modes.buffer import BufferedStep, read_steps, sizes_of, write_steps
from rlhf_ray.trainers.ppo.modes.one_step_off import CLOSING_S
from rlhf_ray.trainers.ppo.modes.window import Slice, Window
from rlhf_ray.trainers.ppo.sampling import Collected, Phase, PromptStream, Sampler, refuse_stale
from rlhf_ray.trajectories.batch import TrajectoryBatch

Answers = tuple[list[TokenizedPrompt], TrajectoryBatch]


class Windowed:
    """Collects steps whose answers a background thread samples."""

    trains_on_newest = False

    def __init__(
        self,
        config: PpoConfig,
        sampler: Sampler,
        prompts: PromptStream,
        stop_engines: Callable[[], None] = lambda: None,
    ) -> None:
        """``stop_engines`` ends what the background thread waits for, at the end of a run."""
        self.config = config
        self.sampler = sampler
        self.prompts = prompts
        self._stop_engines = stop_engines
        self._slice = config.rollout.prompts_per_slice(config.batch.prompts_per_step)
        self._window: Window[Answers] | None = None
        self._current: list[tuple[Slice, Answers]] = []
        self._refused = False
        """Whether the current step was too old to train on."""
        self._positions: dict[int, dict[str, Any]] = {}
        """The position of the prompts before each step that was begun and is not finished."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._paused, self._busy, self._closed = True, False, False
        self._busy_s, self._measured_at = 0.0, time.perf_counter()

    def collect(self, step: int, version: int, phase: Phase) -> Collected:
        """The samples of ``step``, in the order of its prompts; sampling goes on for the steps after it."""
        window = self._window_at(step)
        for finished in [number for number in self._positions if number < step]:
            del self._positions[finished]
        with phase("rollout"), self._changed:
            self._paused = False
            self._start()
            self._changed.notify_all()
            self._changed.wait_for(lambda: window.ready() or self._error is not None)
            if not window.ready():
                assert self._error is not None, "it was waited for one or the other"
                raise self._error
            self._current, self._refused = window.take(), False
            metrics = self._measure()
            self._changed.notify_all()
        trajectories = number_samples(TrajectoryBatch.concatenate([batch for _, (_, batch) in self._current]))
        try:
            refuse_stale(trajectories, version, self.config.max_staleness)
        except StaleWeightsError:  # no checkpoint takes them: a resumed run would be refused them as well
            self._refused = True
            raise
        return Collected([prompt for _, (part, _) in self._current for prompt in part], trajectories, metrics=metrics)

    def settle(self) -> None:
        """Wait for the slice that is being sampled, and begin no other until the next :meth:`collect`."""
        with self._changed:
            self._paused = True
            self._changed.wait_for(lambda: not self._busy)

    def position(self, step: int) -> dict[str, Any]:
        """The position before ``step``, some of whose prompts may be begun."""
        with self._changed:
            return self._positions.get(step) or self.prompts.state()

    def save(self, directory: Path, step: int) -> None:
        """Write the finished slices of ``step`` and of those after it; none where ``step`` was refused."""
        if self._refused:
            return
        with self._changed:
            kept = [] if self._window is None else self._window.kept()
        current = [(one, answers) for one, answers in self._current if one.step >= step]
        slices = [
            BufferedStep(one.step, tuple(prompt.prompt_id for prompt in prompts), batch)
            for one, (prompts, batch) in [*current, *kept]
        ]
        write_steps(directory, slices, sizes_of(self.config))

    def restore(self, directory: Path) -> None:
        """Take the slices of a checkpoint; their prompts, which come next in the stream, count as taken."""
        slices = read_steps(directory, sizes_of(self.config))
        if not slices:
            return
        window = self._window_at(slices[0].step)
        number = window.step * window.size
        for saved in slices:
            before = self.prompts.state()
            prompts = self.prompts.take(len(saved.prompt_ids))
            if not saved.answers(prompts):
                self.prompts.restore(before)
                get_logger("ppo").warning(
                    "the checkpoint's samples of step %d answer other prompts than the data has now: they are sampled again",
                    saved.step + 1,
                )
                return
            self._positions.setdefault(saved.step, before)
            window.restore([(Slice(saved.step, number, len(prompts)), (prompts, saved.trajectories))])
            number += len(prompts)

    def close(self) -> None:
        """Stop the engines if they work for a step that nobody will use, and end the thread."""
        with self._changed:
            self._closed = True
            busy = self._busy
            self._changed.notify_all()
        if busy:
            self._stop_engines()
        if self._thread is not None:
            self._thread.join(CLOSING_S)

    # The background thread

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rollout window", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (begun := self._begin()) is not None:
            one, prompts = begun
            began = time.perf_counter()
            try:
                answers = self.sampler.generate(prompts, one.step)
            except Exception as error:  # raised again by collect, in the thread of the loop
                self._end(began, error)
                return
            self._end(began, None, one, (prompts, answers))

    def _begin(self) -> tuple[Slice, list[TokenizedPrompt]] | None:
        """The next slice, once one may be begun; none where the run ends."""
        assert self._window is not None, "collect makes it before it starts the thread"
        with self._changed:
            while not self._closed:
                one = None if self._paused else self._window.next(self._slice)
                if one is not None:
                    self._positions.setdefault(one.step, self.prompts.state())
                    self._busy = True
                    return one, self.prompts.take(one.prompts)
                self._changed.wait()
            return None

    def _end(self, began: float, error: Exception | None, *finished: Any) -> None:
        with self._changed:
            self._busy_s += time.perf_counter() - began
            self._busy, self._error = False, error
            if finished:
                assert self._window is not None, "what is finished was begun"
                self._window.finish(*finished)
            self._changed.notify_all()

    # Inside

    def _window_at(self, step: int) -> Window[Answers]:
        if self._window is None:
            size = self.config.batch.prompts_per_step
            self._window = Window(self.config.rollout.window, size, self.config.steps, step)
        return self._window

    def _measure(self) -> dict[str, float]:
        """What the engines did since the last step was taken, and what they have in work and ready now."""
        now = time.perf_counter()
        elapsed, seconds = now - self._measured_at, self._busy_s
        self._measured_at, self._busy_s = now, 0.0
        assert self._window is not None, "a step was taken from it"
        samples = self.config.batch.samples_per_prompt
        begun, waiting = self._window.counts()
        return {
            "rollout/seconds": seconds,
            "rollout/engines_idle": max(1.0 - seconds / elapsed, 0.0),
            "rollout/in_flight": float(begun * samples),
            "rollout/buffered": float(waiting * samples),
        }


def number_samples(batch: TrajectoryBatch) -> TrajectoryBatch:
    """The batch with samples of each prompt counted through: slices count their own, and a prompt may be in two of them."""
    counts: dict[int, int] = {}
    indices = []
    for prompt in batch["prompt_id"].tolist():
        indices.append(counts.get(prompt, 0))
        counts[prompt] = indices[-1] + 1
    numbers = torch.tensor(indices, dtype=batch["sample_index"].dtype)
    return batch.with_columns(sample_index=numbers)
