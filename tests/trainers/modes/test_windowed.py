"""The mode ``windowed`` in whole runs in this process; ``test_window.py`` proves its bound over every order of events.

What must hold: no token is older than ``rollout.window`` publications, and engines that are fast reach that age; every prompt
is used once, in order, over a resume too; finished answers of a checkpoint are used, and none are whose weights are unknown.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf_ray.data.load import TokenizedPrompt
from rlhf_ray.data.order import Part
from rlhf_ray.errors import GroupError, ResumableStop, StaleWeightsError
from rlhf_ray.rollout.errors import TooSlowError
from rlhf_ray.rollout.fleet import Engines, Fleet, Pump
from rlhf_ray.rollout.requests import Generation, gather, make_requests
from rlhf_ray.runs.directory import RunDirectory
from rlhf_ray.trainers import stopping
from rlhf_ray.trainers.ppo.modes.buffer import read_steps, sizes_of
from rlhf_ray.trainers.ppo.modes.one_step_off import OneStepOff
from rlhf_ray.trainers.ppo.modes.windowed import Answers, Windowed, number_samples
from rlhf_ray.trainers.ppo.sampling import PromptStream, Sampler, refuse_stale
from rlhf_ray.trainers.ppo.update import Learner
from rlhf_ray.trajectories.batch import TrajectoryBatch
from rlhf_ray.trajectories.columns import FinishReason
from tests.trainers.modes.test_one_step_off import lines, small, start, train
from tests.trainers.small_runs import signals_as_before

pytestmark = pytest.mark.early
STEPS, SIZE = 6, 3


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    with signals_as_before():
        yield


def windowed(root: Path, *overrides: str) -> Any:
    sizes = "samples_per_prompt: 2, sequences_per_update: 6, max_tokens_per_micro_batch: 512"
    batch = f"batch={{prompts_per_step: {SIZE}, {sizes}}}"
    return small(root, "rollout.mode=windowed", "run.deterministic=false", f"steps={STEPS}", batch, *overrides)


def taken(run: RunDirectory) -> list[int]:
    return [prompt for entry in run.ledger.entries() for prompt in entry.prompt_ids]


def wait_until_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step learns only once the engines are as far ahead as they may be, which is the oldest that answers can be."""
    collect, learn, modes = Windowed.collect, Learner.learn, list[Windowed]()

    def collecting(self: Windowed, *arguments: Any) -> Any:
        modes[:] = [self]
        return collect(self, *arguments)

    def learning(self: Learner, *batch: Any, **options: Any) -> Any:
        window, end = modes[0]._window, time.monotonic() + 20
        assert window is not None
        while window.counts() != (0, SIZE * min(window.steps, STEPS - window.step)):
            assert time.monotonic() < end, f"the window does not fill: {window.counts()}"
            time.sleep(0.002)
        return learn(self, *batch, **options)

    monkeypatch.setattr(Windowed, "collect", collecting)
    monkeypatch.setattr(Learner, "learn", learning)


@pytest.mark.parametrize("window", [pytest.param(1, marks=pytest.mark.long), 2])
def test_answers_of_engines_that_are_ahead_reach_the_age_of_the_window_and_no_more(
    window: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_until_full(monkeypatch)
    config = windowed(tmp_path, f"rollout.window={window}")
    run = start(config)
    train(config, run)
    assert lines(run, "rollout/staleness") == [min(step, window) for step in range(STEPS)]
    assert len(taken(run)) == len(set(taken(run))) == STEPS * SIZE
    assert len(lines(run, "rollout/in_flight")) == len(lines(run, "rollout/buffered")) == STEPS


def test_a_resumed_run_uses_the_finished_answers_of_its_checkpoint_and_every_prompt_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = windowed(tmp_path)
    with monkeypatch.context() as patch:
        wait_until_full(patch)
        run = start(config)
        patch.setattr(stopping._stop, "is_set", lambda: run.ledger.last_step == 2)
        with pytest.raises(ResumableStop, match="after step 2 of 6"):
            train(config, run)
        run.release()
    again, checkpoint = RunDirectory.resume(run.path)
    assert checkpoint is not None
    kept = read_steps(checkpoint.path, sizes_of(config))
    assert [prompt for one in kept for prompt in one.prompt_ids] and {one.step for one in kept} == {2, 3}
    ages = {
        int(version) for one in kept for version in one.trajectories["weight_version"][one.trajectories["action_mask"]]
    }
    assert ages <= {0, 1}, "by the weights before the checkpoint's, which is version 2"
    train(config, again, checkpoint)
    ids = taken(again)
    assert ids[2 * SIZE : 4 * SIZE] == [prompt for one in kept for prompt in one.prompt_ids]
    assert len(ids) == len(set(ids)) == STEPS * SIZE
    assert lines(again, "rollout/staleness")[2] == 2.0 and max(lines(again, "rollout/staleness")) <= 2


@pytest.mark.parametrize("mode", ["one_step_off", "windowed"])
def test_a_run_that_fails_while_it_scores_keeps_the_step_that_it_took_and_those_after_it(
    mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint then holds one step more than may be begun after it."""
    config = windowed(tmp_path, f"rollout.mode={mode}", "checkpoint.every_steps=0")

    def waiting(self: Windowed | OneStepOff, step: int, version: int, phase: Any) -> Any:
        collected = collect(self, step, version, phase)
        if isinstance(self, OneStepOff):
            self.settle()
        elif step == 2:
            assert self._window is not None
            end = time.monotonic() + 20
            while self._window.counts() != (0, 2 * SIZE):
                assert time.monotonic() < end, f"the window does not fill: {self._window.counts()}"
                time.sleep(0.002)
        if step == 2:
            away.touch()
        return collected

    away = tmp_path / "away"
    owner = Windowed if mode == "windowed" else OneStepOff
    collect: Any = owner.collect
    run = start(config)
    with monkeypatch.context() as patch:
        patch.setattr(owner, "collect", waiting)
        with pytest.raises(ResumableStop, match="Everything up to step 2 is committed"):
            train(config, run)
        run.release()
    away.unlink()
    again, checkpoint = RunDirectory.resume(run.path)
    assert checkpoint is not None
    kept = read_steps(checkpoint.path, sizes_of(config))
    assert [one.step for one in kept] == ([2, 3, 4] if mode == "windowed" else [2, 3])
    train(config, again, checkpoint)
    ids = taken(again)
    assert ids[2 * SIZE : 4 * SIZE] == [prompt for one in kept[:2] for prompt in one.prompt_ids]
    assert len(ids) == len(set(ids)) == STEPS * SIZE


def test_an_error_of_the_background_thread_costs_no_step_whose_answers_are_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = Pump.turn

    def failing(self: Pump, **options: bool) -> Any:
        prompts = self._stream._prompts
        if prompts and min(prompts) >= 3 * SIZE:
            raise TooSlowError("rollout", 0, "generate", "two requests were unfinished")
        return turn(self, **options)

    monkeypatch.setattr(Pump, "turn", failing)
    config = windowed(tmp_path, "checkpoint.every_steps=0")
    run = start(config)
    with pytest.raises(TooSlowError, match="two requests were unfinished"):
        train(config, run)
    assert run.ledger.last_step == 3 and run.checkpoints.steps() == [3]


@pytest.mark.parametrize("whole", [False, True], ids=["a prompt", "a step"])
def test_a_prompt_that_was_set_aside_ends_no_run_but_a_whole_step_of_them_does(
    whole: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With top-k, batches have columns that one without answers lacks."""
    requests, lost = Sampler.requests, list[int]()

    def losing(self: Sampler, prompt: Any, number: int) -> Any:
        if number // SIZE == 1 and (whole or not lost):
            lost.append(prompt.prompt_id)
            self.fleet.set_aside |= set(lost)
        return requests(self, prompt, number)

    monkeypatch.setattr(Sampler, "requests", losing)
    config = windowed(tmp_path, "rollout.top_k=40", "steps=3")
    run, error = start(config), None
    try:
        train(config, run)
    except Exception as ended:
        error = ended
    assert len(lost) == (SIZE if whole else 1)
    if whole:
        assert isinstance(error, GroupError) and "each prompt killed 3 engines" in str(error)
        assert run.ledger.last_step == 1
    else:
        assert error is None and lost[0] in taken(run) and len(taken(run)) == 3 * SIZE


def test_no_answer_is_saved_where_the_step_before_it_was_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resumed run would be refused the same answers again."""
    from rlhf_ray.config.jobs.ppo import PpoConfig

    with monkeypatch.context() as patch:
        wait_until_full(patch)
        patch.setattr(PpoConfig, "max_staleness", 0)
        config = windowed(tmp_path, "checkpoint.every_steps=0")
        run = start(config)
        with pytest.raises(StaleWeightsError):
            train(config, run)
        run.release()
    again, checkpoint = RunDirectory.resume(run.path)
    assert checkpoint is not None and checkpoint.step == 1
    assert read_steps(checkpoint.path, sizes_of(config)) == []
    train(config, again, checkpoint)
    assert len(taken(again)) == len(set(taken(again))) == STEPS * SIZE


@pytest.mark.parametrize(
    ("overrides", "limit"),
    [
        ([], "rollout.window allows 2, as algorithm.max_staleness is not set"),
        (["rollout.mode=sync"], "rollout.mode sync allows 0, as algorithm.max_staleness is not set"),
        (["algorithm.max_staleness=3"], "algorithm.max_staleness is 3"),
    ],
)
def test_an_answer_that_is_too_old_is_refused_by_the_key_that_the_bound_comes_from(
    overrides: list[str], limit: str, tmp_path: Path
) -> None:
    batch = TrajectoryBatch.from_sequences(
        [[1, 2]], action_mask=torch.tensor([False, True]), weight_version=torch.tensor([-1, 5], dtype=torch.int32)
    )
    config = windowed(tmp_path, *overrides)
    refuse_stale(batch, 5 + config.max_staleness, config)
    with pytest.raises(StaleWeightsError) as caught:
        refuse_stale(batch, 9, config)
    assert str(caught.value) == (
        f"a token was sampled by weight version 5, 4 publication(s) ago, and {limit}: set algorithm.max_staleness to 4 or "
        "more, or sample again"
    )


def test_a_prompt_that_is_twice_in_a_step_has_samples_with_numbers_of_their_own() -> None:
    batch = TrajectoryBatch.from_arrays(
        {
            "offsets": np.arange(6),
            "token_ids": np.arange(5),
            "prompt_id": np.array([4, 4, 9, 4, 4]),
            "sample_index": np.array([0, 1, 0, 0, 1], np.int32),
        }
    )
    assert number_samples(batch)["sample_index"].tolist() == [0, 1, 0, 2, 3]


DATA = [TokenizedPrompt(100 + number, "", (1, 2 + number)) for number in range(12)]


def mode_at(step: int, config: Any) -> tuple[Windowed, PromptStream]:
    prompts = PromptStream(DATA, [Part(len(DATA), len(DATA))], 0)
    mode = Windowed(config, Sampler(config, Fleet(Engines([]))), prompts)
    mode._window_at(step)
    return mode, prompts


def saved_at(step: int, config: Any, directory: Path, *answered: int) -> Windowed:
    """What has begun five prompts, and has answers to some of them."""
    mode, prompts = mode_at(step, config)
    assert mode._window is not None
    first = step * SIZE
    for number, prompt in enumerate(prompts.take(5), first):
        assert mode._window.next() == number
        mode._begun[number] = prompt
    for number in answered:
        prompt = mode._begun.pop(first + number)
        (request,) = make_requests([(prompt.prompt_id, prompt.token_ids)], samples_per_prompt=1, max_new_tokens=1)
        answer = Generation(*request.key, (5,), (-0.5,), (7,), FinishReason.LENGTH)
        mode._window.finish(first + number, Answers(prompt, gather([request], [answer])))
    mode.save(directory, step)
    return mode


@pytest.mark.parametrize(("steps", "kept"), [(2, 0), (3, SIZE), (4, 5)])
def test_a_run_that_is_to_end_sooner_has_the_prompts_of_the_steps_that_it_lost_yet_to_take(
    steps: int, kept: int, tmp_path: Path
) -> None:
    config = windowed(tmp_path)
    saved_at(2, config, tmp_path, 0, 1, 2, 4)
    again, stream = mode_at(2, config.model_copy(update={"steps": steps}))
    again.restore(tmp_path)
    assert stream.take(1) == prompts_at(DATA, kept)
    assert len(again._current) == (SIZE if kept else 0), "the next step is there at once"


def test_a_checkpoint_keeps_answers_behind_prompts_that_have_none_yet(tmp_path: Path) -> None:
    """Prompts 0 and 2 are still in work: a resumed run samples them again, and the answers to 1 and 3 are used."""
    config = windowed(tmp_path)
    mode = saved_at(0, config, tmp_path, 3, 1)
    again, stream = mode_at(0, config)
    again.restore(tmp_path)
    assert mode._window is not None
    assert again._window is not None and again._again == [0, 2]
    kept = again._window.answered()
    assert {number: one.batch["prompt_id"].tolist() for number, one in kept.items()} == {
        number: [mode._window.answered()[number].prompt.prompt_id] for number in (1, 3)
    }
    assert stream.take(1) == prompts_at(DATA, 4), "prompt 4, behind the last answer, is yet to be taken"


def prompts_at(data: list[TokenizedPrompt], number: int) -> list[TokenizedPrompt]:
    return PromptStream(data, [Part(len(data), len(data))], 0).take(number + 1)[number:]
