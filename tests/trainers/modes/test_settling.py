"""While weights are sent or answers compared, the engines do nothing for the modes that sample ahead; in ``one_step_off`` a
checkpoint waits for them too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.actors.publisher import Publisher
from rlhf_ray.actors.workers.rollout import RolloutWorker
from rlhf_ray.rollout.engine import RolloutEngine
from rlhf_ray.trainers.checkpointing import Checkpointer
from rlhf_ray.trainers.ppo.evaluation import PpoEvaluation
from rlhf_ray.trainers.ppo.sampling import Sampler
from rlhf_ray.trainers.ppo.update import Learner, StepOutcome
from tests.trainers.modes.test_one_step_off import small, start, train
from tests.trainers.small_runs import signals_as_before

pytestmark = pytest.mark.early


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    with signals_as_before():
        yield


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, int]]:
    """What used the engines, how many calls of the mode were under way then, and how many answers the engine had in work.

    Sampling takes longer than learning here, so that it is under way whenever nobody waits for it.
    """
    running, engines, seen = [0], set[RolloutEngine](), list[tuple[str, int, int]]()
    generate, advance = Sampler.generate, RolloutWorker.advance

    def slowly(call: Callable[..., Any], *arguments: Any) -> Any:
        running[0] += 1
        time.sleep(0.25)
        try:
            return call(*arguments)
        finally:
            running[0] -= 1

    def sampling(self: Sampler, prompts: Any, step: int) -> Any:
        return slowly(generate, self, prompts, step)

    def advancing(self: RolloutWorker, requests: Any, seconds: float) -> Any:
        engines.add(self.engine)
        return slowly(advance, self, requests, 0.0)  # one token of each answer

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            seen.append((name, running[0], sum(engine.unfinished for engine in engines)))
            return call(*arguments, **options)

        return noted

    monkeypatch.setattr(Sampler, "generate", sampling)
    monkeypatch.setattr(RolloutWorker, "advance", advancing)
    for owner, name in ((Publisher, "publish"), (PpoEvaluation, "compare"), (Checkpointer, "save")):
        monkeypatch.setattr(owner, name, noting(name, getattr(owner, name)))
    return seen


def run(mode: str, root: Path, *overrides: str) -> None:
    settings = [f"rollout.mode={mode}", f"run.deterministic={str(mode != 'windowed').lower()}", "steps=3"]
    schedule = ["evaluation={prompts: 2, every_steps: 1}", "checkpoint.every_steps=2"]
    config = small(root, *settings, *schedule, *overrides)
    train(config, start(config))


@pytest.mark.parametrize("applied", [True, False])
def test_others_use_the_engines_only_while_one_step_off_does_not(
    applied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seen: list[tuple[str, int, int]]
) -> None:
    """A step whose updates were all skipped publishes nothing, so that nothing but the mode keeps its comparison waiting."""
    learn = Learner.learn

    def learning(self: Learner, *batch: Any, **options: Any) -> StepOutcome:
        return replace(learn(self, *batch, **options), policy_applied=applied)

    monkeypatch.setattr(Learner, "learn", learning)
    run("one_step_off", tmp_path)
    assert {name for name, _, _ in seen} == {"publish", "compare", "save"}
    assert [one for one in seen if one[1]] == []


@pytest.mark.parametrize("partial", [True, False])
def test_in_a_window_engines_stand_still_for_weights_with_unfinished_answers_only_if_these_may_go_on(
    partial: bool, tmp_path: Path, seen: list[tuple[str, int, int]]
) -> None:
    run("windowed", tmp_path, f"rollout.partial={partial}")
    assert {name for name, _, _ in seen} == {"publish", "compare", "save"}
    assert [one for one in seen if one[0] == "publish" and one[1]] == []
    assert [one for one in seen if one[0] == "compare" and one[1:] != (0, 0)] == []
    in_work = [count for name, _, count in seen if name == "publish"]
    assert any(in_work) == partial, f"answers in work when weights were sent: {in_work}"
