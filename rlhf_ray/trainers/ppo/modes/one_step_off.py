"""The mode ``one_step_off``: while a step learns, the engines sample the next one with the weights that it began with.

Invariants:

- A step trains on samples of the publication before its own, or of its own where no update has moved the weights since. Two
  batches at most are under way: the one that is learned from and the next.
- One background thread collects one step at a time, in the order of the steps, and takes its prompts then. Nothing else uses
  the engines meanwhile: weights are published, and others are answered, after it has ended. So what a step is
  sampled from does not depend on time, and a deterministic run repeats bit for bit.
- A checkpoint holds the samples of the next step if they are finished, no episode failed and none is too old, with the versions
  of their tokens, and the position of the prompts before that step. Others are sampled again, by the weights of the checkpoint.
  Either way each prompt is used once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.console import get_logger
from rlhf_ray.errors import StaleWeightsError
from rlhf_ray.processes import spans
from rlhf_ray.trainers.ppo.modes.buffer import BufferedStep, read_steps, sizes_of, write_steps
from rlhf_ray.trainers.ppo.sampling import Collected, Collector, Phase, PromptStream, refuse_stale

CLOSING_S = 30.0
"""How long the end of a run waits for its background thread, whose engines were stopped."""
WAITS_FOR = "the step that is sampled"


class _Step:
    """The samples of one step, finished or under way."""

    def __init__(self, step: int, position: dict[str, Any]) -> None:
        self.step, self.position = step, position
        """The position of the prompts is that before the step has taken any."""
        self.collected: Collected | None = None
        self.error: Exception | None = None
        self.thread: threading.Thread | None = None
        self.began = self.ended = time.perf_counter()

    def start(self, collect: Callable[[], Collected]) -> None:
        """Collect in a thread of its own, which does not keep the process from ending."""
        self.thread = threading.Thread(target=self._run, args=(collect,), name=f"step {self.step}", daemon=True)
        self.thread.start()

    def _run(self, collect: Callable[[], Collected]) -> None:
        try:
            self.collected = collect()
        except Exception as error:  # raised again by result, in the thread of the loop
            self.error = error
        self.ended = time.perf_counter()

    @property
    def running(self) -> bool:
        return self.thread is not None and self.thread.is_alive()

    def wait(self, timeout_s: float | None = None) -> None:
        """Wait until it has ended, in whatever."""
        if self.thread is not None:
            with spans.waiting(name=WAITS_FOR):
                self.thread.join(timeout_s)

    def result(self) -> Collected:
        """Wait for the samples; raises what collecting them ended in, in its own type."""
        self.wait()
        if self.error is not None:
            raise self.error
        assert self.collected is not None, "a step that has ended without an error has samples"
        return self.collected


class OneStepOff:
    """Collects each step while the one before it learns."""

    trains_on_newest = False

    def __init__(
        self,
        config: PpoConfig,
        collector: Collector,
        prompts: PromptStream,
        stop_engines: Callable[[], None] = lambda: None,
    ) -> None:
        """``collector`` runs in the background thread; ``stop_engines`` ends what it waits for, at the end of a run."""
        self.config = config
        self.collector = collector
        self.prompts = prompts
        self._stop_engines = stop_engines
        self._steps: dict[int, _Step] = {}
        self._last_ended: float | None = None

    def collect(self, step: int, version: int, phase: Phase) -> Collected:
        """The samples of ``step``, which are usually there; those of the next step are begun."""
        for finished in [number for number in self._steps if number < step]:
            del self._steps[finished]
        one = self._steps.get(step) or self._begin(step, version)
        with phase("rollout"):
            collected = one.result()
        try:
            refuse_stale(collected.trajectories, version, self.config)
        except StaleWeightsError as error:  # no checkpoint takes them: a resumed run would be refused them as well
            one.collected, one.error = None, error
            raise
        metrics = self._measure(one)
        if step + 1 < self.config.steps and step + 1 not in self._steps:
            self._begin(step + 1, version)
        return replace(collected, metrics=metrics)

    def pause(self) -> None:
        """Wait for the step that is under way."""
        self.settle()

    def settle(self) -> None:
        """Wait for the step that is under way; what it ended in is raised by :meth:`collect`."""
        for one in self._steps.values():
            one.wait()

    def before_checkpoint(self) -> None:
        """Wait for the step that is under way."""
        self.settle()

    def position(self, step: int) -> dict[str, Any]:
        """The position before ``step``, which may be under way or finished."""
        one = self._steps.get(step)
        return self.prompts.state() if one is None else one.position

    def save(self, directory: Path, step: int) -> None:
        """Write the samples of ``step`` and the one after it, as far as they are finished."""
        ready = []
        for number in (step, step + 1):
            one = self._steps.get(number)
            if one is None or one.running or one.collected is None:
                break
            ids = tuple(prompt.prompt_id for prompt in one.collected.prompts)
            ready.append(BufferedStep(number, ids, one.collected.trajectories))
        write_steps(directory, ready, sizes_of(self.config))

    def restore(self, directory: Path) -> None:
        """Take the samples of a checkpoint; their prompts, which come next in the stream, count as taken."""
        for saved in read_steps(directory, sizes_of(self.config)):
            one = _Step(saved.step, self.prompts.state())
            prompts = self.prompts.take(len(saved.prompt_ids))
            if not saved.answers(prompts):
                self.prompts.restore(one.position)
                get_logger("ppo").warning(
                    "the checkpoint's samples of step %d answer other prompts than the data has now: they are sampled again",
                    saved.step + 1,
                )
                return
            one.collected = Collected(prompts, saved.trajectories)
            self._steps[saved.step] = one

    def go_back(self, position: dict[str, Any], directory: Path | None) -> None:
        """Wait for the step that is under way, and forget all; its prompts are taken again."""
        self.settle()
        self._steps.clear()
        self.prompts.restore(position)
        if directory is not None:
            self.restore(directory)

    def close(self) -> None:
        """Stop the engines if they work for a step that nobody will use, and wait for the thread."""
        running = [one for one in self._steps.values() if one.running]
        if running:
            self._stop_engines()
        for one in running:
            one.wait(CLOSING_S)

    def _begin(self, step: int, version: int) -> _Step:
        one = _Step(step, self.prompts.state())
        one.start(lambda: self.collector.collect(step, version, _untimed))
        self._steps[step] = one
        return one

    def _measure(self, one: _Step) -> dict[str, float]:
        """Seconds of generating, and the share of the time since the last step's samples in which the engines had no work."""
        if one.thread is None:  # from a checkpoint
            return {}
        seconds, last, self._last_ended = one.ended - one.began, self._last_ended, one.ended
        if last is None:
            return {"rollout/seconds": seconds}
        return {"rollout/seconds": seconds, "rollout/engines_idle": max(one.began - last, 0.0) / (one.ended - last)}


def _untimed(name: str) -> AbstractContextManager[None]:
    """Phases of the background thread are not phases of the step that learns meanwhile."""
    return nullcontext()
