"""The policy reads what an environment of verifiers wrote and nothing else; a failure there is a failure here, and no reward.

A program that speaks the lines of ``verifiers_server.py`` stands in for verifiers, which needs an environment of its own; with
VERIFIERS_PYTHON, its interpreter, the worked example is played by verifiers itself (``make verifiers``).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from rlhf_ray.environments import Answer, Task, Turn, verifiers
from rlhf_ray.environments.process import EnvironmentProcess, Question
from rlhf_ray.environments.protocol import Failed
from rlhf_ray.environments.verifiers import Server, Verifiers, main, make_rows
from rlhf_ray.errors import RequestError

REAL, EXAMPLES = os.environ.get("VERIFIERS_PYTHON", ""), str(Path(__file__).parents[2] / "examples")
AWAY = """
import verifiers.v1 as vf

class AwayTask(vf.Task[vf.TaskData]):
    @vf.reward
    async def judge(self, trace):
        raise ValueError("the judge is away")

class AwayTaskset(vf.Taskset[AwayTask]):
    def load(self):
        yield AwayTask(vf.TaskData(prompt="Say."), self.config.task)

__all__ = ["AwayTaskset"]
"""
"""A taskset of verifiers whose reward raises."""
NAME = "rlhf_ray.environments.verifiers:Verifiers"
STAND_IN = """
import json, sys
taskset = json.loads(sys.argv[1])
def send(**line):
    print(json.dumps(line), flush=True)
send(**({"error": "no such taskset"} if taskset["id"] == "missing" else {"ready": True}))
scripts, held = {}, []
for line in map(json.loads, sys.stdin):
    if "tasks" in line:
        send(tasks=[{"prompt": one, "label": {}} for one in taskset["prompts"][: line["tasks"]]])
    elif "drop" in line:
        held.append(line["drop"])
    else:
        episode = line.get("start", line.get("answer"))
        script = scripts.setdefault(episode, line.get("task", {}).get("script"))
        step = script.pop(0)
        if step == "die":
            sys.exit(3)
        if step == "dropped":
            send(episode=episode, error=str(held))
            continue
        text = json.dumps(step).replace("TEXT", json.dumps(line.get("text", ""))[1:-1])
        if script and script[0] == "later":
            script.pop(0)
            held.append((episode, text))
            continue
        while held and isinstance(held[-1], tuple):
            other, waiting = held.pop()
            send(episode=other, **json.loads(waiting))
        send(episode=episode, **json.loads(text))
"""


def said(role, content):
    return {"role": role, "content": content}


ASK, HINT = said("user", "Guess."), said("user", "low")
FIRST = {"messages": [ASK]}
SECOND = {"messages": [ASK, said("assistant", "TEXT"), HINT]}


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    started = []

    class Kept(Server):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            started.append(self)

    (tmp_path / "server.py").write_text(STAND_IN)
    monkeypatch.setattr(verifiers, "SERVER", tmp_path / "server.py")
    monkeypatch.setattr(verifiers, "Server", Kept)
    verifiers.server_of.cache_clear()
    yield
    verifiers.server_of.cache_clear()
    for server in started:
        server.close()


def begin(*script, messages=(ASK,)):
    episode = Verifiers(sys.executable, {"id": "guess"})
    episode.reset(Task("", {"script": list(script)}, tuple(messages)))
    return episode


def test_an_observation_is_what_the_environment_added_and_the_reward_stands_at_the_last_turn(stand_in):
    episode = begin(FIRST, SECOND, {"reward": 0.5})
    assert episode.step(Answer(" 5\n", True)) == Turn(0.0, False, [HINT])
    assert episode.step(Answer("7", True)) == Turn(0.5)


def test_an_empty_answer_is_one_whether_the_environment_keeps_it_as_a_text_or_as_nothing(stand_in):
    episode = begin(FIRST, {"messages": [ASK, {"role": "assistant"}, HINT]})
    assert episode.step(Answer("", True)).observation == [HINT]


@pytest.mark.parametrize(
    "messages",
    [
        [said("user", "Guess well."), said("assistant", "TEXT"), HINT],
        [ASK, said("assistant", "TEXT!"), HINT],
        [ASK],
    ],
    ids=["its prompt", "the answer", "less than before"],
)
def test_an_environment_that_writes_its_past_anew_has_failed(stand_in, messages):
    with pytest.raises(RuntimeError, match="anew, which the policy has read or answered already"):
        begin(FIRST, {"messages": messages}).step(Answer("5", True))


def test_an_environment_that_begins_with_more_than_the_row_has_failed(stand_in):
    with pytest.raises(RuntimeError, match="messages that the row does not have"):
        begin({"messages": [ASK, HINT]})


def test_a_failure_over_there_is_one_here_and_no_reward(stand_in):
    with pytest.raises(RuntimeError, match="verifiers: scoring: no answer"):
        begin(FIRST, {"error": "scoring: no answer"}).step(Answer("5", True))


def test_each_episode_gets_its_own_lines_in_whatever_order_they_come(stand_in):
    one, other = begin(FIRST, {"reward": 1.0}, "later"), begin(FIRST, {"reward": 2.0})
    one.server.write(answer=one.episode, text="", finished=True)
    assert other.step(Answer("", True)) == Turn(2.0)
    assert one._next() == {"episode": one.episode, "reward": 1.0}


def test_an_episode_that_nobody_goes_on_with_is_ended_over_there(stand_in):
    episode = begin(FIRST)
    number = episode.episode
    del episode
    with pytest.raises(RuntimeError, match=rf"verifiers: \[{number}\]"):
        begin(FIRST, "dropped").step(Answer("", True))


def test_a_process_that_ended_is_an_error_that_names_it(stand_in):
    with pytest.raises(RequestError, match=r"the process of verifiers .* ended with 3"):
        begin(FIRST, "die").step(Answer("", True))


def test_an_environment_that_cannot_be_made_is_an_error_that_says_why(stand_in):
    with pytest.raises(RequestError, match="no such taskset"):
        Server(sys.executable, '{"id": "missing"}', ".")
    with pytest.raises(RequestError, match=r"python '/no/python': .*name the interpreter"):
        Server("/no/python", '{"id": "guess"}', ".")


def test_rows_hold_the_prompt_and_the_task_and_a_task_without_prompt_is_refused(stand_in):
    assert make_rows(sys.executable, {"id": "g", "prompts": [[ASK], [HINT]]}, 1) == [{"prompt": [ASK], "label": {}}]
    with pytest.raises(RequestError, match="task 1 of g has no prompt"):
        make_rows(sys.executable, {"id": "g", "prompts": [[ASK], []]}, 9)


@pytest.mark.long
@pytest.mark.skipif(not REAL, reason="VERIFIERS_PYTHON names no interpreter with verifiers")
def test_the_worked_example_is_played_by_verifiers_itself(tmp_path):
    main([REAL, "guess_taskset", str(tmp_path / "rows.jsonl"), "--folder", EXAMPLES, "--rows", "12"])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["label"]["number"] for row in rows] == [*range(10), 0, 1]
    assert rows[3]["prompt"] == [said("user", "Guess a number from 0 to 9.")]
    task = Task("", rows[3]["label"], tuple(rows[3]["prompt"]))
    parameters = {"python": REAL, "taskset": {"id": "guess_taskset"}, "folder": EXAMPLES}
    process = EnvironmentProcess(NAME, parameters, timeout_s=60.0)
    try:
        first = [
            Question((0, sample), task, (Answer(text, True),), ()) for sample, text in enumerate(("5", " 3\n", "x", ""))
        ]
        outcomes = process.ask(first)
        hints = ("high", "That is no number.", "That is no number.")
        later = [Turn(0.0, False, [said("user", hint)]) for hint in hints]
        assert outcomes == [later[0], Turn(1.0), *later[1:]]
        second = [Question((0, sample), task, (Answer(text, True), Answer("3", True)), (turn,))
                  for sample, text, turn in ((0, "5", later[0]), (2, "x", later[1]))]  # fmt: skip
        assert process.ask(second) == [Turn(0.5), Turn(0.5)]
        broken = Task("", {"prompt": "Guess a number from 0 to 9."}, tuple(rows[3]["prompt"]))
        (failed,) = process.ask([Question((1, 0), broken, (Answer("3", True),), ())])
        assert isinstance(failed, Failed) and "number\\n  Field required" in failed.reason
    finally:
        process.close()


@pytest.mark.long
@pytest.mark.skipif(not REAL, reason="VERIFIERS_PYTHON names no interpreter with verifiers")
def test_a_reward_of_verifiers_that_raises_is_a_failure_and_not_zero(tmp_path):
    (tmp_path / "away_taskset.py").write_text(AWAY)
    (row,) = make_rows(REAL, {"id": "away_taskset"}, 5, str(tmp_path))
    episode = Verifiers(REAL, {"id": "away_taskset"}, str(tmp_path))
    episode.reset(Task("", row["label"], tuple(row["prompt"])))
    with pytest.raises(RuntimeError, match="the judge is away"):
        episode.step(Answer("x", True))
