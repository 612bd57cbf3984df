"""The end of a run while engines work for a step that nobody will use: it comes at once, and starts no engine again."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from io import StringIO
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.data.order import Part
from rlhf_ray.errors import DeadRankError, GroupError
from rlhf_ray.pending import Pending
from rlhf_ray.rollout.fleet import Engines, Fleet
from rlhf_ray.rollout.requests import Generation, GenerationRequest
from rlhf_ray.rollout.wire import PublishedWeights
from rlhf_ray.trainers.ppo.build import make_mode
from rlhf_ray.trainers.ppo.modes.window import Window
from rlhf_ray.trainers.ppo.sampling import FixedSampling, PromptStream, Sampler
from rlhf_ray.trajectories.columns import FinishReason
from tests.trainers.modes.test_one_step_off import small

pytestmark = pytest.mark.early
AT_ONCE_S = 3.0
"""Far below the waits between restarts, which take 15 s together."""


class Engine:
    """Ranks and handle of an engine that answers the prompts of the first step, and then works until it is stopped."""

    def __init__(self, prompts: int) -> None:
        self.left = prompts
        self.busy, self.stopped = threading.Event(), threading.Event()

    def generate(self, requests: Sequence[GenerationRequest], deadline_s: float) -> Pending[list[Generation]]:
        self.left -= len({one.prompt_id for one in requests}) or 1
        if self.left >= 0:
            return Pending.done([Generation(*one.key, (5,), (-0.1,), (0,), FinishReason.STOP) for one in requests])
        self.busy.set()
        return Pending(self._die, self.stopped.wait)

    def advance(
        self, requests: Sequence[GenerationRequest], seconds: float, deadline_s: float
    ) -> Pending[list[Generation]]:
        answered = list(dict.fromkeys(one.prompt_id for one in requests))[: self.left]
        return self.generate([one for one in requests if one.prompt_id in answered], deadline_s)

    def receive(self, weights: Any) -> Pending[None]:
        return Pending.done(None)

    def probe(self) -> Pending[Any]:
        raise GroupError("rollout", None, "probe", "its processes have been stopped")

    def stop(self) -> None:
        self.stopped.set()

    def _die(self) -> Any:
        raise DeadRankError("rollout", 0, "generate", "its process died: killed")


@pytest.mark.parametrize(
    ("name", "overrides"), [("one_step_off", []), ("windowed", []), ("windowed", ["rollout.window=1"])]
)
def test_a_run_that_ends_while_its_engines_work_ends_at_once_and_restarts_none(
    name: str, overrides: list[str], tmp_path: Path, project_log: StringIO, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a window of one step the engines have stood still before the step is taken, and work on after it."""
    deterministic = f"run.deterministic={str(name != 'windowed').lower()}"
    config = small(tmp_path, f"rollout.mode={name}", deterministic, *overrides)
    engine, restarts = Engine(config.batch.prompts_per_step), list[int]()

    def restart(number: int, incarnation: int) -> Pending[None]:
        restarts.append(incarnation)
        raise GroupError("rollout", None, "restart", "its processes have been stopped")

    fleet = Fleet(Engines([engine], restart=restart))
    fleet.update_weights(0, PublishedWeights(0, (), "of nothing"))  # this engine reads no weights
    data = [TokenizedPrompt(number, "", (1, 2)) for number in range(24)]
    prompts, sampler = PromptStream(data, [Part(len(data), len(data))], 0), Sampler(config, fleet)
    mode = make_mode(config, FixedSampling(config, prompts, sampler), prompts, sampler, [engine])  # type: ignore[list-item]
    if overrides:
        ready = Window.ready
        monkeypatch.setattr(Window, "ready", lambda window: ready(window) and mode._still)  # type: ignore[attr-defined]
    mode.collect(0, 0, lambda phase: nullcontext())
    assert engine.busy.wait(10)
    began = time.monotonic()
    mode.close()
    assert restarts == [] and time.monotonic() - began < AT_ONCE_S
    assert engine.stopped.is_set() and project_log.getvalue() == "", "engines that were stopped are no news"
