"""All modes, over any order of answers, deaths and restarts of engines, skipped updates, checkpoints and resumes.

A run also ends between taking a step and finishing it, and goes on with fewer steps than it was to have.

What must hold whatever happens when: each step learns from its own prompts, every prompt is used once and in the order of the
data, each with all its samples; no token is older than the mode's bound, and the version of each is that of the weights that
its engine held. The modes, the fleet and its restarts are real; only the engines' processes are made up.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_ray.config.jobs.ppo import PpoConfig
from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.data.order import Part
from rlhf_ray.errors import DeadRankError
from rlhf_ray.pending import Pending
from rlhf_ray.rollout.errors import WeightUpdateError
from rlhf_ray.rollout.fleet import Engines, Fleet
from rlhf_ray.rollout.health import HealthPolicy
from rlhf_ray.rollout.requests import Generation, GenerationRequest, Probe
from rlhf_ray.rollout.wire import PublishedWeights
from rlhf_ray.trainers.ppo.build import make_mode
from rlhf_ray.trainers.ppo.modes import Mode, Windowed
from rlhf_ray.trainers.ppo.sampling import FixedSampling, PromptStream, Sampler
from rlhf_ray.trajectories.columns import FinishReason
from tests.trainers.modes.test_one_step_off import small

pytestmark = pytest.mark.early
STEPS, SIZE, SAMPLES, ENGINES, TOKENS = 6, 3, 2, 2, 4
DATA = [TokenizedPrompt(number, "", (1, 2 + number)) for number in range(STEPS * SIZE)]


class Chance:
    """Drawn events, for several threads."""

    def __init__(self, seed: int, deaths: float) -> None:
        self._random, self._lock, self.deaths = random.Random(seed), threading.Lock(), deaths

    def happens(self, share: float) -> bool:
        with self._lock:
            return self._random.random() < share

    def up_to(self, most: int) -> int:
        with self._lock:
            return self._random.randint(0, most)


class Engine:
    """A process that samples, with the handle by which the fleet reaches it: after a restart it holds nothing of before.

    The first token of an answer says with which weights it was begun, so that a wrong version is seen.
    """

    def __init__(self, chance: Chance) -> None:
        self.chance = chance
        self.restart()

    def restart(self) -> None:
        self.version = -1
        self.work: dict[Any, tuple[GenerationRequest, list[int]]] = {}
        self.alive = True

    def generate(self, requests: Sequence[GenerationRequest], deadline_s: float) -> Pending[list[Generation]]:
        if not self._lives():
            return self._dead()
        return self._later([_answer(one, [self.version] * TOKENS) for one in requests])

    def advance(
        self, requests: Sequence[GenerationRequest], seconds: float, deadline_s: float
    ) -> Pending[list[Generation]]:
        self.work |= {one.key: (one, []) for one in requests}
        if not self._lives():
            return self._dead()
        done = []
        for request, versions in list(self.work.values()):
            versions += [self.version] * min(self.chance.up_to(3), TOKENS - len(versions))
            if len(versions) == TOKENS:
                del self.work[request.key]
                done.append(_answer(request, versions))
        return self._later(done) if self._lives() else self._dead()

    def receive(self, weights: Any) -> Pending[None]:
        if not self._lives():
            return Pending(lambda: _raise(WeightUpdateError("rollout", 0, "receive", "it was killed in the middle")))
        self.version = weights.version
        return Pending.done(None)

    def probe(self) -> Pending[Probe]:
        return Pending.done(Probe(None, self.version, len(self.work)))

    def _lives(self) -> bool:
        self.alive = self.alive and not self.chance.happens(self.chance.deaths)
        return self.alive

    def _dead(self) -> Pending[Any]:
        return Pending(lambda: _raise(DeadRankError("rollout", 0, "generate", "it was killed")))

    def _later(self, value: Any) -> Pending[Any]:
        """There after it was asked for a few times, so that calls end in any order."""
        left = [self.chance.up_to(3)]

        def ready(timeout_s: float) -> bool:
            left[0] -= 1
            return left[0] < 0

        return Pending(lambda: value, ready)


def _answer(request: GenerationRequest, versions: Sequence[int]) -> Generation:
    tokens = tuple(100 + version for version in versions)
    return Generation(*request.key, tokens, (-0.5,) * TOKENS, tuple(versions), FinishReason.LENGTH)


def _raise(error: Exception) -> Any:
    raise error


class Process:
    """One attempt of a run: the loop of ``trainers/ppo/loop.py`` in its order, without what it computes."""

    def __init__(self, config: PpoConfig, root: Path, chance: Chance, aside: set[int]) -> None:
        self.config, self.root, self.chance = config, root, chance
        self.engines = [Engine(chance) for _ in range(ENGINES)]

        def restart(engine: int, incarnation: int) -> Pending[None]:
            self.engines[engine].restart()
            return Pending.done(None)

        policy = HealthPolicy(max_restarts=10_000, backoff_s=0.0)
        self.fleet = Fleet(Engines(self.engines, restart=restart, policy=policy))
        self.fleet.set_aside = aside  # as the run directory keeps it
        self.prompts = PromptStream(DATA, [Part(len(DATA), len(DATA))], 0)
        sampler = Sampler(config, self.fleet)
        collector = FixedSampling(config, self.prompts, sampler)
        self.mode: Mode = make_mode(config, collector, self.prompts, sampler, [])

    def run(self, saved: dict[str, Any], ledger: list[list[int]], stop_after: int) -> dict[str, Any]:
        """Go on from a checkpoint for at most some steps; returns the last checkpoint."""
        step, version, position = saved["step"], saved["version"], saved["prompts"]
        del ledger[step:]
        if saved["prompts"] is not None:
            self.prompts.restore(saved["prompts"])
            self.mode.restore(self.root / str(saved["number"]))
        self._publish(version)
        try:
            while step < self.config.steps and stop_after > 0:
                stop_after -= 1
                ids = self._collect(step, version)
                if step > 0 and self.chance.happens(0.15):  # scoring fails, say: the step before is committed
                    self._wait_until_full()
                    return saved if saved["step"] == step else self._save(saved, step, version, position)
                ledger.append(ids)
                step, version = step + 1, version + self.chance.happens(0.8)
                position = self.mode.position(step)
                if self.chance.happens(0.5) or step == self.config.steps:
                    self.mode.before_checkpoint()
                    saved = self._save(saved, step, version, position)
                self._publish(version)
                if self.chance.happens(0.2):
                    self.mode.settle()
                    assert all(not engine.work for engine in self.engines if engine.alive), "others may use the engines"
        finally:
            self.fleet.stop()
            self.mode.close()
        return saved

    def _save(self, last: dict[str, Any], step: int, version: int, position: Any) -> dict[str, Any]:
        saved = {"step": step, "version": version, "prompts": position, "number": last["number"] + 1}
        directory = self.root / str(saved["number"])
        directory.mkdir()
        self.mode.save(directory, step)
        return saved

    def _wait_until_full(self) -> None:
        """Scoring takes its time at times: the engines are then as far ahead as they may be."""
        if not isinstance(self.mode, Windowed) or self.chance.happens(0.3):
            return
        window, end = self.mode._window, time.monotonic() + 20
        assert window is not None
        while window.counts() != (0, SIZE * min(window.steps, window.total - window.step)):
            assert time.monotonic() < end, f"the window does not fill: {window.counts()}"
            time.sleep(0.005)

    def _collect(self, step: int, version: int) -> list[int]:
        """The prompts of ``step``, whose samples are as they must be."""
        collected = self.mode.collect(step, version, lambda phase: nullcontext())
        batch = collected.trajectories
        actions, versions = batch["action_mask"], batch["weight_version"]
        assert batch["token_ids"][actions].tolist() == [100 + one for one in versions[actions].tolist()]
        ages = set((version - versions[actions]).tolist())
        assert ages <= set(range(self.config.rollout.staleness + 1)), f"publications of age: {ages}"
        if not self.config.rollout.partial:
            by_answer = versions[actions].view(-1, TOKENS)
            assert bool((by_answer == by_answer[:, :1]).all()), "every answer is of one version"
        ids = [prompt.prompt_id for prompt in collected.prompts]
        aside = self.fleet.set_aside
        expected = [(one, sample) for one in ids if one not in aside for sample in range(SAMPLES)]
        found = list(zip(batch["prompt_id"].tolist(), batch["sample_index"].tolist(), strict=True))
        # one that is set aside while a later step is sampled has its answers in the step before
        assert [one for one in found if one[0] not in aside] == expected
        return ids

    def _publish(self, version: int) -> None:
        self.mode.pause()
        self.fleet.update_weights(version, PublishedWeights(version, (), "of nothing"))


MODES = [("sync", False), ("one_step_off", False), ("windowed", False), ("windowed", True)]


ORDER = {
    "seed": st.integers(0, 2**32),
    "deaths": st.sampled_from([0.0, 0.05, 0.1]),
    "window": st.integers(1, 3),
    "stop": st.integers(1, 5),
}


def expect_the_bound_and_every_prompt_once(
    root: Path, name: str, partial: bool, seed: int, deaths: float, window: int, stop: int
) -> None:
    """Run attempt after attempt, the first four of ``stop`` steps at most, until all steps are done.

    Some are to end sooner, as soon as where they begin.
    """
    batch = f"batch={{prompts_per_step: {SIZE}, samples_per_prompt: {SAMPLES}, sequences_per_update: {SIZE * SAMPLES}}}"
    config = small(
        root, f"rollout.mode={name}", f"rollout.partial={partial}", f"rollout.window={window}", f"steps={STEPS}", batch,
        f"run.deterministic={name != 'windowed'}", f"rollout.engines={ENGINES}", "rollout.max_num_seqs=2",
    )  # fmt: skip
    chance = Chance(seed, deaths)
    saved: dict[str, Any] = {"step": 0, "version": 0, "prompts": None, "number": 0}
    ledger: list[list[int]] = []
    aside: set[int] = set()
    for attempt in range(60):
        sooner = chance.happens(0.3) and attempt < 4
        total = max(saved["step"], 1) + chance.up_to(1) if sooner else STEPS
        shorter = config.model_copy(update={"steps": min(total, STEPS)})
        saved = Process(shorter, root, chance, aside).run(saved, ledger, stop if attempt < 4 else STEPS)
        if len(ledger) == STEPS:
            break
    used = [prompt for step in ledger for prompt in step]
    assert used == [prompt.prompt_id for prompt in PromptStream(DATA, [Part(len(DATA), len(DATA))], 0).take(len(DATA))]


@pytest.mark.parametrize(("name", "partial"), MODES)
@settings(max_examples=8, deadline=None)
@given(**ORDER)
def test_tokens_keep_to_the_bound_and_every_prompt_is_used_once(
    name: str, partial: bool, tmp_path_factory: pytest.TempPathFactory, **order: Any
) -> None:
    expect_the_bound_and_every_prompt_once(tmp_path_factory.mktemp("run"), name, partial, **order)


@pytest.mark.long
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("name", "partial"), MODES)
@settings(max_examples=250, deadline=None)
@given(**ORDER)
def test_so_it_is_in_many_more_orders(
    name: str, partial: bool, tmp_path_factory: pytest.TempPathFactory, **order: Any
) -> None:
    expect_the_bound_and_every_prompt_once(tmp_path_factory.mktemp("run"), name, partial, **order)
