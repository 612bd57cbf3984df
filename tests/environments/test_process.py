"""Every question gets a turn or a failure; an episode that hangs, raises or ends its process costs only itself, and the others
go on where they were.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlhf_ray.environments.process import EnvironmentProcess, Question
from rlhf_ray.environments.protocol import Answer, EpisodeFailure, Failed, Task, Turn
from rlhf_ray.errors import RequestError
from rlhf_ray.trainers.ppo import build

ENVIRONMENT = '''
import os, time
from rlhf_ray.environments import Turn

OBSERVATIONS = {"number": 5, "bytes": b"x", "none": None, "texts": ["x"], "mapping": {"role": "user", "content": "x"}}

class Counts:
    """Rewards the number of answers so far, and does what an answer says."""
    def __init__(self, scale=1.0):
        self.scale = scale
    def reset(self, task):
        self.task, self.count = task, 0
    def step(self, answer):
        self.count += 1
        if answer.text == "raise": raise ValueError("broken")
        if answer.text == "slow": time.sleep(0.4)
        if answer.text == "hang": time.sleep(60)
        if answer.text == "die": os._exit(3)
        if answer.text == "nothing": return None
        if answer.text == "no number": return Turn(None)
        if answer.text == "nan": return Turn(float("nan"))
        if answer.text == "silent": return Turn(0.0, done=False)
        if answer.text in OBSERVATIONS: return Turn(0.0, done=False, observation=OBSERVATIONS[answer.text])
        if answer.text == "differs": return Turn(float(os.getpid()), done=False, observation="?")
        return Turn(self.scale * self.count, done=answer.text == "end", observation=f"{self.task.label} {self.count}")
'''


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    path = tmp_path_factory.mktemp("environment") / "counts.py"
    path.write_text(ENVIRONMENT)
    process = EnvironmentProcess(f"{path}:Counts", {"scale": 2.0}, timeout_s=1.0)
    yield process
    process.close()


def question(number, *answers, turns=()):
    return Question((number, 0), Task("p", label=number), tuple(Answer(text, True) for text in answers), tuple(turns))


def test_failures_cost_only_their_own_episode_and_the_others_are_played_again(process):
    first = process.ask([question(number, "go") for number in range(6)])
    assert first == [Turn(2.0, False, f"{number} 1") for number in range(6)]
    texts = ["go", "hang", "raise", "die", "nothing", "end"]
    second = process.ask([question(n, "go", text, turns=[first[n]]) for n, text in enumerate(texts)])
    kinds = [None if isinstance(one, Turn) else one.kind for one in second]
    failures = (EpisodeFailure.LATE, EpisodeFailure.RAISED, EpisodeFailure.ENDED, EpisodeFailure.NO_REWARD)
    assert kinds == [None, *failures, None]
    assert second[0] == Turn(4.0, False, "0 2")
    assert second[5] == Turn(4.0, True, "5 2"), "a new process has played its first turn again"
    third = process.ask([question(0, "go", "go", "end", turns=[first[0], second[0]])])
    assert third == [Turn(6.0, True, "0 3")]


def test_a_turn_that_is_played_again_has_the_time_limit_for_itself(process):
    """Three turns of 0.4 s are longer than the limit of 1 s, and each is shorter."""
    turns = [Turn(2.0 * n, False, f"0 {n}") for n in (1, 2)]
    process.ask([question(1, "die")])
    (last,) = process.ask([question(0, "slow", "slow", "slow", turns=turns)])
    assert last == Turn(6.0, False, "0 3")
    (late,) = process.ask([question(0, "slow", "slow", "slow", "hang", turns=[*turns, last])])
    assert isinstance(late, Failed)
    assert late.kind == EpisodeFailure.LATE


@pytest.mark.parametrize("text", ["nothing", "no number", "nan", "silent"])
def test_a_turn_without_a_finite_reward_or_anything_to_read_is_a_failure(process, text):
    (outcome,) = process.ask([question(0, text)])
    assert isinstance(outcome, Failed)
    assert outcome.kind == EpisodeFailure.NO_REWARD


@pytest.mark.parametrize("text", ["number", "bytes", "none", "texts", "mapping"])
def test_an_observation_of_another_type_is_a_failure(process, text):
    (outcome,) = process.ask([question(0, text)])
    assert isinstance(outcome, Failed)
    assert outcome.kind == EpisodeFailure.UNREADABLE


def test_an_episode_that_goes_otherwise_when_it_is_played_again_has_failed(process):
    (first,) = process.ask([question(0, "differs")])
    process.ask([question(1, "die")])
    (second,) = process.ask([question(0, "differs", "end", turns=[first])])
    assert isinstance(second, Failed)
    assert "must repeat" in second.reason


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("class Counts:\n    def __init__(self, scale): pass\n", "methods reset"),
        ("class Counts:\n    def __init__(self, size): pass\n", "scale"),
        ("raise OSError('gone')\n", "cannot be imported"),
        (
            "class Counts:\n    def __init__(self, scale): raise ValueError('too small')\n"
            "    def reset(self, task): pass\n    def step(self, answer): pass\n",
            "making it with {'scale': 1.0} raised ValueError('too small')",
        ),
    ],
)
def test_what_is_no_environment_is_refused_by_its_key(tmp_path, code, text):
    (tmp_path / "counts.py").write_text(code)
    with pytest.raises(RequestError, match=r"rollout\.environment\.name") as error:
        EnvironmentProcess(f"{tmp_path}/counts.py:Counts", {"scale": 1.0}, timeout_s=1.0)
    assert text in str(error.value)


def test_environments_are_made_before_a_model_is_loaded(monkeypatch):
    def refuse(*_):
        raise RequestError("no such taskset")

    loaded = []
    monkeypatch.setattr(build, "make_player", refuse)
    monkeypatch.setattr(build, "start_groups", lambda *_: loaded.append("models") or ({}, []))
    monkeypatch.setattr(build, "updates_in_all", lambda *_: 1)
    with pytest.raises((RequestError, AttributeError)):
        build.build(None, None, SimpleNamespace(cleanup=None), None, None, None, None, None)
    assert loaded == []
