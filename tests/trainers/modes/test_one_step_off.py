"""The mode ``one_step_off``.

What must hold: each step after the first trains on samples of the publication before its own, and these are generated while
the step before it learns; deterministic runs repeat bit for bit, over a resume too; every prompt is used once; an error of the
background thread ends the run in its own type, after what is finished is committed.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from rlhf_ray.actors.this_process import ThisProcess
from rlhf_ray.config.loading import dump_config
from rlhf_ray.errors import ResumableStop, StaleWeightsError
from rlhf_ray.rollout.errors import TooSlowError
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers import stopping
from rlhf_ray.trainers.ppo.build import train_ppo
from rlhf_ray.trainers.ppo.modes import buffer
from rlhf_ray.trainers.ppo.sampling import Sampler
from rlhf_ray.trainers.ppo.self_check import LOG_PROBS, UPDATED_LOG_PROBS
from rlhf_ray.trainers.ppo.update import Learner
from tests.trainers.small_runs import config_of, signals_as_before

pytestmark = pytest.mark.early
STEPS = 4


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    with signals_as_before():
        yield


def small(root: Path, *overrides: str) -> Any:
    root.mkdir(exist_ok=True)
    world = "data.world={prompts: 24, evaluation_prompts: 2}"
    return config_of("ppo", root, f"steps={STEPS}", world, "rollout.mode=one_step_off", *overrides)


def start(config: Any) -> RunDirectory:
    return RunDirectory.create(Path(config.run.root) / config.run.name, dump_config(config))


def train(config: Any, run: RunDirectory, checkpoint: Any = None) -> None:
    train_ppo(config, run, checkpoint, place=ThisProcess(config.cluster))


def lines(run: RunDirectory, name: str) -> list[float]:
    return [line[name] for line in run.metrics.read() if name in line]


def weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    return load_file(run.final / "model.safetensors")


def same(one: RunDirectory, other: RunDirectory) -> bool:
    first, second = weights(one), weights(other)
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    config = small(tmp_path_factory.mktemp("undisturbed"))
    run = start(config)
    train(config, run)
    return run


def test_each_step_trains_on_samples_of_the_publication_before(undisturbed: RunDirectory) -> None:
    assert lines(undisturbed, "weights/version") == [1, 2, 3, 4]
    assert lines(undisturbed, "rollout/staleness") == lines(undisturbed, "rollout/staleness_mean") == [0, 1, 1, 1]
    assert len(lines(undisturbed, "rollout/engines_idle")) == STEPS - 1


def test_every_prompt_is_used_once_and_in_order(undisturbed: RunDirectory) -> None:
    taken = [entry.prompt_ids for entry in undisturbed.ledger.entries()]
    assert [len(ids) for ids in taken] == [2] * STEPS and len(set(itertools.chain(*taken))) == 2 * STEPS


def test_the_engines_are_compared_once_with_the_newest_weights_although_no_step_trains_on_them(
    undisturbed: RunDirectory,
) -> None:
    checks = [check.name for check in undisturbed.summary().checks]
    assert checks.count(LOG_PROBS) == checks.count(UPDATED_LOG_PROBS) == 1


def test_the_next_step_is_sampled_while_this_one_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step but the last learns only once the samples of the next are asked for: a mode that samples later never does."""
    asked, learn, generate = [threading.Event() for _ in range(3)], Learner.learn, Sampler.generate
    waited: list[bool] = []

    def generating(self: Sampler, prompts: Any, step: int) -> Any:
        asked[step].set()
        return generate(self, prompts, step)

    def learning(self: Learner, *batch: Any, **options: Any) -> Any:
        upcoming = len(waited) + 1
        waited.append(upcoming == 3 or asked[upcoming].wait(timeout=5))
        return learn(self, *batch, **options)

    monkeypatch.setattr(Learner, "learn", learning)
    monkeypatch.setattr(Sampler, "generate", generating)
    config = small(tmp_path, "steps=3")
    train(config, start(config))
    assert waited == [True, True, True]


@pytest.mark.long
def test_a_second_run_has_the_same_bits(undisturbed: RunDirectory, tmp_path: Path) -> None:
    config = small(tmp_path)
    again = start(config)
    train(config, again)
    assert same(undisturbed, again)


def stopped_after_two(config: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[RunDirectory, Any]:
    """A run that was asked to stop after two of its four steps, and what it goes on from."""
    run = start(config)
    monkeypatch.setattr(stopping._stop, "is_set", lambda: run.ledger.last_step == 2)
    with pytest.raises(ResumableStop, match="after step 2 of 4"):
        train(config, run)
    run.release()
    monkeypatch.undo()
    again, checkpoint = RunDirectory.resume(run.path)
    assert checkpoint is not None
    return again, checkpoint


def test_a_run_that_was_stopped_goes_on_with_the_samples_of_its_checkpoint_to_the_same_bits(
    undisturbed: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path)
    again, checkpoint = stopped_after_two(config, monkeypatch)
    (kept,) = buffer.read_steps(checkpoint.path, SIZES)
    assert kept.step == 2
    assert set(kept.trajectories["weight_version"][kept.trajectories["action_mask"]].tolist()) == {1}
    train(config, again, checkpoint)
    assert same(undisturbed, again)
    assert [entry.prompt_ids for entry in again.ledger.entries()] == [
        entry.prompt_ids for entry in undisturbed.ledger.entries()
    ]


SIZES = {
    "mode": "one_step_off",
    "window": 2,
    "max_new_tokens": 4,
    "max_model_tokens": 64,
    "environment": None,
    "routing_replay": False,
    "stop_tokens": [],
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "prompts_per_step": 2,
    "samples_per_prompt": 2,
}


LONG = pytest.mark.long


@pytest.mark.parametrize("how", ["mode", pytest.param("sizes", marks=LONG), pytest.param("prompts", marks=LONG)])
def test_samples_that_do_not_fit_the_resumed_run_are_sampled_again_by_the_weights_of_the_checkpoint(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path)
    again, checkpoint = stopped_after_two(config, monkeypatch)
    if how == "sizes":
        config = small(tmp_path, "rollout.max_new_tokens=5")
    elif how == "mode":
        config = small(tmp_path, "rollout.mode=sync")
    else:
        monkeypatch.setattr(buffer.BufferedStep, "answers", lambda self, prompts: False)
    train(config, again, checkpoint)
    ages = [0.0, 0.0] if how == "mode" else [0.0, 1.0]
    assert lines(again, "rollout/staleness")[2:] == ages
    taken = [prompt for entry in again.ledger.entries() for prompt in entry.prompt_ids]
    assert len(taken) == len(set(taken)) == 2 * STEPS


def test_an_error_of_the_background_thread_ends_the_run_in_its_own_type_and_costs_no_finished_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(tmp_path, "checkpoint.every_steps=0")
    run, generate = start(config), Sampler.generate
    threads: list[bool] = []

    def failing(self: Sampler, prompts: Any, step: int) -> Any:
        if step == 2:
            threads.append(threading.current_thread() is threading.main_thread())
            raise TooSlowError("rollout", 0, "generate", "two requests were unfinished")
        return generate(self, prompts, step)

    monkeypatch.setattr(Sampler, "generate", failing)
    with pytest.raises(TooSlowError, match="two requests were unfinished"):
        train(config, run)
    assert threads == [False]
    assert run.ledger.last_step == 2 and run.checkpoints.steps() == [2]


def test_a_token_older_than_the_bound_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_ray.config.jobs.ppo import PpoConfig

    monkeypatch.setattr(PpoConfig, "max_staleness", 0)
    config = small(tmp_path, "checkpoint.every_steps=0")
    run = start(config)
    with pytest.raises(
        StaleWeightsError,
        match=r"sampled by weight version 0, 1 publication\(s\) ago, and rollout.mode one_step_off allows 0, as "
        r"algorithm.max_staleness is not set: set algorithm.max_staleness to 1 or more",
    ):
        train(config, run)
    run.release()
    again, checkpoint = RunDirectory.resume(run.path)
    assert checkpoint is not None and checkpoint.step == 1
    assert not (checkpoint.path / buffer.FILE).exists(), "a resumed run would be refused the same samples again"
    monkeypatch.undo()
    train(config, again, checkpoint)
    taken = [prompt for entry in again.ledger.entries() for prompt in entry.prompt_ids]
    assert len(taken) == len(set(taken)) == 2 * STEPS


def test_no_step_from_a_failed_episode_on_is_written(tmp_path: Path) -> None:
    from rlhf_ray.trajectories.batch import TrajectoryBatch

    def step(number: int, failure: int) -> buffer.BufferedStep:
        batch = TrajectoryBatch.from_sequences(
            [[1, 2]] * 2, episode_failure=torch.tensor([0, failure], dtype=torch.int8)
        )
        return buffer.BufferedStep(number, (number,), batch)

    buffer.write_steps(tmp_path, [step(3, 0), step(4, 2), step(5, 0)], {})
    assert [one.step for one in buffer.read_steps(tmp_path, {})] == [3]
    other = tmp_path / "other"
    other.mkdir()
    buffer.write_steps(other, [step(3, 1)], {})
    assert not (other / buffer.FILE).exists()


@pytest.mark.parametrize(
    ("override", "same"),
    [
        ("rollout.max_model_tokens=96", False),
        ("rollout.environment.max_turns=2", False),
        ("rollout.environment.parameters={broken: [x]}", False),
        ("rollout.environment.timeout_s=7", True),
        ("rollout.routing_replay=true", False),
    ],
)
def test_samples_of_another_environment_or_length_are_of_other_sizes(tmp_path: Path, override: str, same: bool) -> None:
    overrides = ["rollout.environment={name: 'a.b:C'}", "reward={function: environment, hold_s: 0.0}"]
    one, other = (small(tmp_path, *overrides, *more) for more in ([], [override]))
    assert (buffer.sizes_of(one) == buffer.sizes_of(other)) is same


def test_a_file_of_samples_gives_back_what_was_written_and_nothing_for_other_sizes(tmp_path: Path) -> None:
    from rlhf_ray.trajectories.batch import TrajectoryBatch

    batch = TrajectoryBatch.from_arrays(
        {
            "offsets": np.array([0, 2, 5]),
            "token_ids": np.array([1, 2, 1, 3, 4]),
            "weight_version": np.array([-1, 7, -1, 7, 8], np.int32),
            "prompt_id": np.array([5, 5]),
        }
    )
    steps = [buffer.BufferedStep(3, (5, 9), batch), buffer.BufferedStep(4, (1,), batch.select([0]))]
    buffer.write_steps(tmp_path, steps, {"samples": 2})
    back = buffer.read_steps(tmp_path, {"samples": 2})
    assert [(one.step, one.prompt_ids) for one in back] == [(3, (5, 9)), (4, (1,))]
    for one, other in zip(steps, back, strict=True):
        assert one.trajectories.columns == other.trajectories.columns
        for name in one.trajectories.columns:
            assert torch.equal(one.trajectories[name], other.trajectories[name])
    assert buffer.read_steps(tmp_path, {"samples": 3}) == []
