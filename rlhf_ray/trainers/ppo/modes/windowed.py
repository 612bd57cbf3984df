"""The mode ``windowed``: the engines sample up to ``rollout.window`` steps ahead of the one that learns, without a pause.

Invariants:

- What may be begun, and which answers a step gets, is :class:`Window`'s to say; no token is older than ``rollout.window``.
- One background thread keeps the engines sampling, and nothing else uses them meanwhile. Others have them after
  :meth:`Windowed.settle`, when no prompt is in work, and before the next :meth:`Windowed.collect`.
- Weights change after :meth:`Windowed.pause`. With ``rollout.partial`` what is in work then goes on under the new ones, and
  each token has the version that sampled it; without, it is finished first, and every answer is of one version.
- A checkpoint holds every answered prompt of steps to come, with the versions of its tokens, and which prompts were begun
  besides. These are sampled again, from the start: never does a run train on what a process that is gone left unfinished.
  A step that was taken and not finished counts as taken once more, so that the steps that were begun after it keep their
  answers. A run that is to end sooner leaves those of the steps that it lost, and has their prompts yet to take.

When a prompt is begun is a matter of time, so this mode does not repeat bit for bit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import Any

import torch

from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.console import get_logger
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.errors import StaleWeightsError
from rlhf_ray.processes import spans
from rlhf_ray.rollout.requests import gather
from rlhf_ray.trainers.ppo.modes.buffer import BufferedStep, read_steps, sizes_of, write_steps
from rlhf_ray.trainers.ppo.modes.one_step_off import CLOSING_S
from rlhf_ray.trainers.ppo.modes.window import Window
from rlhf_ray.trainers.ppo.sampling import Collected, Phase, PromptStream, Sampler, refuse_stale
from rlhf_ray.trajectories.batch import TrajectoryBatch


@dataclass(frozen=True)
class Answers:
    """All samples of a prompt; none of one that was set aside."""

    prompt: TokenizedPrompt
    batch: TrajectoryBatch


class Task(Enum):
    """What the background thread is there for now."""

    SAMPLE = auto()
    """Keep the engines sampling."""
    FINISH = auto()
    """Begin nothing, and finish what the engines have in work."""
    PAUSE = auto()
    """Let the engines stand still, with what they have in work."""
    END = auto()


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
        self._pump = sampler.pump()
        self._window: Window[Answers] | None = None
        self._begun: dict[int, TokenizedPrompt] = {}
        """Prompts that are begun and not answered, by their numbers."""
        self._again: list[int] = []
        """Those of them that an earlier process had begun."""
        self._current: list[Answers] = []
        self._current_step = -1
        self._refused = False
        """Whether the current step was too old to train on."""
        self._positions: dict[int, dict[str, Any]] = {}
        """The position of the prompts before each step that was begun and is not finished."""
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._task, self._still = Task.PAUSE, True
        self._sampled_s, self._measured_at = 0.0, time.perf_counter()

    def collect(self, step: int, version: int, phase: Phase) -> Collected:
        """The samples of ``step``, in the order of its prompts; sampling goes on for the steps after it."""
        window = self._window_at(step)
        for finished in [number for number in self._positions if number < step]:
            del self._positions[finished]
        with phase("rollout"), self._changed:
            self._set(Task.SAMPLE)
            if self._current_step != step:  # a checkpoint may have brought it
                with spans.waiting(name="answers"):
                    self._changed.wait_for(lambda: window.ready() or self._error is not None)
                if not window.ready():
                    assert self._error is not None, "it was waited for one or the other"
                    raise self._error
                self._take(window)
            metrics = self._measure(window)
            self._changed.notify_all()
        trajectories = number_samples(TrajectoryBatch.concatenate([one.batch for one in self._current]))
        try:
            refuse_stale(trajectories, version, self.config)
        except StaleWeightsError:  # no checkpoint takes them: a resumed run would be refused them as well
            self._refused = True
            raise
        return Collected([one.prompt for one in self._current], trajectories, metrics=metrics)

    def pause(self) -> None:
        """Let the engines stand still, with what is in work or without, until the next :meth:`collect`."""
        self._wait_for(Task.PAUSE if self.config.rollout.partial else Task.FINISH)

    def settle(self) -> None:
        """Finish what is in work, and begin nothing until the next :meth:`collect`; raises what sampling ended in."""
        self._wait_for(Task.FINISH)
        if self._error is not None:
            raise self._error

    def before_checkpoint(self) -> None:
        """A checkpoint takes what is answered by then; sampling goes on."""

    def position(self, step: int) -> dict[str, Any]:
        """The position before ``step``, some of whose prompts may be begun."""
        with self._changed:
            return self._positions.get(step) or self.prompts.state()

    def save(self, directory: Path, step: int) -> None:
        """Write the answered prompts of ``step`` and of those after it; none where ``step`` was refused."""
        if self._refused:
            return
        with self._changed:
            steps = self._current_part(step)
            if self._window is not None:
                steps += self._parts(self._window)
        write_steps(directory, steps, sizes_of(self.config))

    def restore(self, directory: Path) -> None:
        """Take the answers of a checkpoint; all prompts that it had begun, which come next in the stream, count as taken."""
        for saved in read_steps(directory, sizes_of(self.config)):
            if saved.step >= self.config.steps:
                return
            window = self._window_at(saved.step)
            before = self.prompts.state()
            prompts = self.prompts.take(len(saved.prompt_ids))
            if not saved.answers(prompts):
                self.prompts.restore(before)
                get_logger("ppo").warning(
                    "the checkpoint's samples of step %d answer other prompts than the data has now: they are sampled again",
                    saved.step + 1,
                )
                return
            self._positions[saved.step] = before
            row = 0
            for prompt, samples in zip(prompts, saved.samples or (), strict=True):
                number = window.next()
                assert number is not None, (
                    "a checkpoint of the same window holds no more than it, but the step that was taken"
                )
                if samples is None:
                    self._begun[number] = prompt
                    self._again.append(number)
                else:
                    window.finish(number, Answers(prompt, saved.trajectories.select(range(row, row + samples))))
                    row += samples
            if self._current_step < 0 and window.ready():
                self._take(window)

    def go_back(self, position: dict[str, Any], directory: Path | None) -> None:
        """Finish what the engines have in work, and forget all; raises what sampling ended in."""
        self.settle()
        with self._changed:
            self._pump = self.sampler.pump()
            self._window, self._sampled_s = None, 0.0
            self._begun.clear()
            self._again.clear()
            self._positions.clear()
            self._current, self._current_step, self._refused = [], -1, False
            self.prompts.restore(position)
            if directory is not None:
                self.restore(directory)

    def close(self) -> None:
        """Stop the engines if they work for a step that nobody will use, and end the thread."""
        with self._changed:
            busy = not self._still
            self._task = Task.END
            self._changed.notify_all()
        if busy:
            self._stop_engines()
        if self._thread is not None:
            self._thread.join(CLOSING_S)

    # The background thread

    def _set(self, task: Task) -> None:
        self._task = task
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="rollout window", daemon=True)
            self._thread.start()
        self._changed.notify_all()

    def _wait_for(self, task: Task) -> None:
        with self._changed:
            if self._thread is None:
                return
            self._still = self._error is not None
            self._set(task)
            with spans.waiting(name="the engines to stand still"):
                self._changed.wait_for(lambda: self._still)

    def _run(self) -> None:
        try:
            while (task := self._next_task()) is not Task.END:
                ended = self._pump.turn(begin=task is Task.SAMPLE, sample=task is not Task.PAUSE)
                batches = [(one.number, gather(one.requests[: len(one.generations)], one.generations)) for one in ended]
                with self._changed:
                    for number, batch in batches:
                        assert self._window is not None, "what is answered was begun"
                        self._window.finish(number, Answers(self._begun.pop(number), batch))
                    if batches:
                        self._changed.notify_all()
        except Exception as error:  # raised again by collect, in the thread of the loop
            with self._changed:
                self._error, self._still = error, True
                self._changed.notify_all()

    def _next_task(self) -> Task:
        """What to do next, once there is something to do; what the window has room for is begun."""
        with self._changed:
            while True:
                task = self._task
                if task is Task.SAMPLE:
                    self._begin()
                busy = {
                    Task.SAMPLE: self._pump.working,
                    Task.FINISH: self._pump.holding or self._pump.calling,
                    Task.PAUSE: self._pump.calling,
                    Task.END: True,
                }[task]
                if busy:
                    self._still = False
                    return task
                self._still = True
                self._changed.notify_all()
                self._changed.wait()

    def _begin(self) -> None:
        assert self._window is not None, "collect makes it before it starts the thread"
        for earlier in self._again:
            self._pump.give(earlier, self.sampler.requests(self._begun[earlier], earlier))
        self._again.clear()
        while True:
            before = self.prompts.state()
            number = self._window.next()
            if number is None:
                return
            self._positions.setdefault(self._window.step_of(number), before)
            (self._begun[number],) = self.prompts.take(1)
            self._pump.give(number, self.sampler.requests(self._begun[number], number))

    # Inside

    def _window_at(self, step: int) -> Window[Answers]:
        if self._window is None:
            size = self.config.batch.prompts_per_step
            self._window = Window(self.config.rollout.window, size, self.config.steps, step)
        return self._window

    def _take(self, window: Window[Answers]) -> None:
        step = window.step
        self._current, self._current_step, self._refused = window.take(), step, False

    def _current_part(self, step: int) -> list[BufferedStep]:
        """The step that was taken, where it has not finished."""
        if self._current_step < step:
            return []
        return [_part(self._current_step, [(one.prompt, one) for one in self._current])]

    def _parts(self, window: Window[Answers]) -> list[BufferedStep]:
        """What was begun of each step to come, up to the last that has an answer."""
        answered = window.answered()
        known: dict[int, tuple[TokenizedPrompt, Answers | None]] = {
            **{number: (prompt, None) for number, prompt in self._begun.items()},
            **{number: (one.prompt, one) for number, one in answered.items()},
        }
        steps: dict[int, list[tuple[TokenizedPrompt, Answers | None]]] = {}
        for number in sorted(known):
            if number <= max(answered, default=-1):
                steps.setdefault(window.step_of(number), []).append(known[number])
        return [_part(step, prompts) for step, prompts in steps.items()]

    def _measure(self, window: Window[Answers]) -> dict[str, float]:
        """What an engine did on average since the last step was taken, and what all have in work and ready now."""
        now, sampled_s = time.perf_counter(), self._pump.sampled_s / self.config.rollout.engines
        elapsed, seconds = now - self._measured_at, sampled_s - self._sampled_s
        self._measured_at, self._sampled_s = now, sampled_s
        samples = self.config.batch.samples_per_prompt
        begun, waiting = window.counts()
        return {
            "rollout/seconds": seconds,
            "rollout/engines_idle": max(1.0 - seconds / elapsed, 0.0),
            "rollout/in_flight": float(begun * samples),
            "rollout/buffered": float(waiting * samples),
        }


def _part(step: int, prompts: list[tuple[TokenizedPrompt, Answers | None]]) -> BufferedStep:
    batches = [answers.batch for _, answers in prompts if answers is not None]
    samples = tuple(None if answers is None else len(answers.batch) for _, answers in prompts)
    ids = tuple(prompt.prompt_id for prompt, _ in prompts)
    return BufferedStep(step, ids, TrajectoryBatch.concatenate(batches) if batches else gather([], []), samples)


def number_samples(batch: TrajectoryBatch) -> TrajectoryBatch:
    """The batch with samples of each prompt counted through: a prompt may be in a step twice, where an epoch ends."""
    counts: dict[int, int] = {}
    indices = []
    for prompt in batch["prompt_id"].tolist():
        indices.append(counts.get(prompt, 0))
        counts[prompt] = indices[-1] + 1
    numbers = torch.tensor(indices, dtype=batch["sample_index"].dtype)
    return batch.with_columns(sample_index=numbers)
