"""While weights are sent, answers compared or a checkpoint written, the engines do nothing for the modes that sample ahead."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rlhf_ray.actors.publisher import Publisher
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


@pytest.mark.parametrize(("mode", "applied"), [("one_step_off", True), ("one_step_off", False), ("windowed", True)])
def test_others_use_the_engines_only_while_the_mode_does_not(
    mode: str, applied: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sampling takes longer than learning here, so that it is under way whenever nobody waits for it.

    A step whose updates were all skipped publishes nothing, so that nothing but the mode keeps its comparison waiting.
    """
    running, seen, generate = [0], list[tuple[str, int]](), Sampler.generate

    def slowly(self: Sampler, prompts: Any, step: int) -> Any:
        running[0] += 1
        time.sleep(0.25)
        try:
            return generate(self, prompts, step)
        finally:
            running[0] -= 1

    def noting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any, **options: Any) -> Any:
            seen.append((name, running[0]))
            return call(*arguments, **options)

        return noted

    def learning(self: Learner, *batch: Any, **options: Any) -> StepOutcome:
        return replace(learn(self, *batch, **options), policy_applied=applied)

    learn = Learner.learn
    monkeypatch.setattr(Learner, "learn", learning)
    monkeypatch.setattr(Sampler, "generate", slowly)
    for owner, name in ((Publisher, "publish"), (PpoEvaluation, "compare"), (Checkpointer, "save")):
        monkeypatch.setattr(owner, name, noting(name, getattr(owner, name)))
    config = small(tmp_path, f"rollout.mode={mode}", f"run.deterministic={str(mode != 'windowed').lower()}", "steps=3",
                   "evaluation={prompts: 2, every_steps: 1}", "checkpoint.every_steps=2")  # fmt: skip
    train(config, start(config))
    assert {name for name, _ in seen} == {"publish", "compare", "save"}
    assert [one for one in seen if one[1]] == []
