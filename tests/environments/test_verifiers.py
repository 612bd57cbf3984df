"""The policy reads what an environment of verifiers wrote and nothing else; a failure there is a failure here, and no reward.

A program that speaks the lines of ``verifiers_server.py`` stands in for verifiers, which needs an environment of its own; with
VERIFIERS_PYTHON, its interpreter, the worked example is played by verifiers itself (``make verifiers``).
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import pytest

from rlhf_ray.environments import Answer, Task, Turn, verifiers
from rlhf_ray.environments.process import EnvironmentProcess, Question
from rlhf_ray.environments.protocol import EpisodeFailure, Failed, ProcessLost
from rlhf_ray.environments.verifiers import Server, Verifiers, main, make_rows
from rlhf_ray.errors import RequestError

REAL, EXAMPLES = os.environ.get("VERIFIERS_PYTHON", ""), str(Path(__file__).parents[2] / "examples")
TASKSET = """
import asyncio, gc, os, pathlib, re, httpx
import verifiers.v1 as vf

class OneTask(vf.Task[vf.TaskData]):
    @vf.reward
    async def judge(self, trace):
        BODY

class OneTaskset(vf.Taskset[OneTask]):
    def load(self):
        yield OneTask(vf.TaskData(prompt="Say.", timeout=TIMEOUT), self.config.task)

__all__ = ["OneTaskset"]
"""
"""A taskset of verifiers with a reward of its own."""
REGEX = 're.match("(a+)+$", "a" * 64 + "b")'
"""Takes years, and does not let go of the interpreter."""
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


def gone(pid, within_s=20.0):
    """Whether a process ends within some seconds."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


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
    with pytest.raises(ProcessLost, match=r"the process of verifiers .* ended with 3"):
        begin(FIRST, "die").step(Answer("", True))


def test_an_environment_that_cannot_be_made_is_an_error_that_says_why(stand_in):
    with pytest.raises(RequestError, match="no such taskset"):
        Server(sys.executable, '{"id": "missing"}', ".")
    with pytest.raises(RequestError, match=r"python '/no/python': .*name the interpreter"):
        Server("/no/python", '{"id": "guess"}', ".")


def test_an_environment_that_cannot_be_made_is_named_before_the_first_episode(interpreter):
    with pytest.raises(RequestError, match="no such taskset"):
        EnvironmentProcess(NAME, {"python": interpreter, "taskset": {"id": "missing"}}, timeout_s=20.0)
    with pytest.raises(RequestError, match=r"python '/no/python': .*name the interpreter"):
        EnvironmentProcess(NAME, {"python": "/no/python", "taskset": {"id": "guess"}}, timeout_s=20.0)


def test_rows_hold_the_prompt_and_the_task_and_a_task_without_prompt_is_refused(stand_in):
    assert make_rows(sys.executable, {"id": "g", "prompts": [[ASK], [HINT]]}, 1) == [{"prompt": [ASK], "label": {}}]
    with pytest.raises(RequestError, match="task 1 of g has no prompt"):
        make_rows(sys.executable, {"id": "g", "prompts": [[ASK], []]}, 9)


@pytest.fixture
def interpreter(tmp_path):
    """A stand-in for the Python with verifiers, for the process that plays environments."""
    (tmp_path / "server.py").write_text(STAND_IN)
    (tmp_path / "python").write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path}/server.py" "$2" "$3"\n')
    (tmp_path / "python").chmod(0o755)
    return str(tmp_path / "python")


def test_a_process_of_verifiers_that_died_costs_only_the_episode_it_died_in(interpreter):
    process = EnvironmentProcess(NAME, {"python": interpreter, "taskset": {"id": "guess"}}, timeout_s=20.0)
    try:
        fine, fatal, new = (
            Task("", {"script": script}, (ASK,))
            for script in ([FIRST, SECOND, {"reward": 0.5}], [FIRST, "die"], [FIRST, {"reward": 1.0}])
        )
        answer, turn = Answer("5", True), Turn(0.0, False, [HINT])
        asked = [Question((number, 0), task, (answer,), ()) for number, task in enumerate((fine, fatal))]
        going_on, failed = process.ask(asked)
        assert going_on == turn
        assert isinstance(failed, Failed) and failed.kind == EpisodeFailure.ENDED
        later = [Question((0, 0), fine, (answer, answer), (turn,)), Question((2, 0), new, (answer,), ())]
        assert process.ask(later) == [Turn(0.5), Turn(1.0)]
    finally:
        process.close()


def test_what_the_policy_is_asked_goes_past_a_proxy(tmp_path, monkeypatch):
    (tmp_path / "server.py").write_text(
        "import json, urllib.request\n"
        "passed = [host for host in ('127.0.0.1', 'inside.org', 'away.org') if urllib.request.proxy_bypass(host)]\n"
        "print(json.dumps({'error': ' '.join(passed)}))"
    )
    monkeypatch.setattr(verifiers, "SERVER", tmp_path / "server.py")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.org:3128")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "inside.org")
    with pytest.raises(RequestError, match=r"guess: 127\.0\.0\.1 inside\.org$"):
        Server(sys.executable, "guess", ".")


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


def one_task(tmp_path, body, timeout="vf.TaskData.model_fields['timeout'].default"):
    """The parameters of an environment of one task whose reward does what ``body`` says, and the task."""
    (tmp_path / "one_taskset.py").write_text(TASKSET.replace("BODY", body).replace("TIMEOUT", timeout))
    (row,) = make_rows(REAL, {"id": "one_taskset"}, 5, str(tmp_path))
    parameters = {"python": REAL, "taskset": {"id": "one_taskset"}, "folder": str(tmp_path)}
    return parameters, Task("", row["label"], tuple(row["prompt"]))


def played(parameters, task, text="x"):
    episode = Verifiers(**parameters)
    episode.reset(task)
    return episode.step(Answer(text, True))


@pytest.mark.long
@pytest.mark.skipif(not REAL, reason="VERIFIERS_PYTHON names no interpreter with verifiers")
def test_a_reward_of_verifiers_that_raises_is_a_failure_and_not_zero(tmp_path):
    with pytest.raises(RuntimeError, match="the judge is away"):
        played(*one_task(tmp_path, 'raise ValueError("the judge is away")'))


@pytest.mark.long
@pytest.mark.skipif(not REAL, reason="VERIFIERS_PYTHON names no interpreter with verifiers")
def test_verifiers_keeps_no_client_of_an_episode_that_has_ended_and_asks_no_proxy(tmp_path, monkeypatch):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # where nobody answers
    body = "return float(sum(isinstance(one, httpx.AsyncClient) for one in gc.get_objects()))"
    environment = one_task(tmp_path, body)
    first = played(*environment).reward
    assert [played(*environment).reward for _ in range(4)] == [first] * 4


@pytest.mark.long
@pytest.mark.skipif(not REAL, reason="VERIFIERS_PYTHON names no interpreter with verifiers")
def test_more_episodes_than_a_client_of_verifiers_has_connections_are_under_way_at_once(tmp_path):
    parameters, task = one_task(tmp_path, "return 1.0")
    episodes = [Verifiers(**parameters) for _ in range(1100)]
    for episode in episodes:
        episode.reset(task)
    assert {episode.step(Answer("x", True)) for episode in episodes} == {Turn(1.0)}


@pytest.mark.long
@pytest.mark.skipif(not REAL, reason="VERIFIERS_PYTHON names no interpreter with verifiers")
def test_a_deadline_of_verifiers_that_passes_while_the_policy_answers_is_a_failure(tmp_path):
    parameters, task = one_task(tmp_path, "return 1.0", 'vf.TaskData.model_fields["timeout"].annotation(agent=0.5)')
    episode = Verifiers(**parameters)
    episode.reset(task)
    time.sleep(1.0)
    with pytest.raises(RuntimeError, match=r"a deadline of verifiers ended it \(agent_timeout\)"):
        episode.step(Answer("x", True))


@pytest.mark.long
@pytest.mark.skipif(not REAL, reason="VERIFIERS_PYTHON names no interpreter with verifiers")
def test_a_reward_of_verifiers_that_never_ends_leaves_no_process(tmp_path):
    body = f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())); {REGEX}"
    parameters, task = one_task(tmp_path, body)
    process = EnvironmentProcess(NAME, parameters, timeout_s=15.0)
    try:
        (late,) = process.ask([Question((0, 0), task, (Answer("x", True),), ())])
        assert isinstance(late, Failed) and late.kind == EpisodeFailure.LATE
        assert gone((tmp_path / "pid").read_text()), "it has timed out, and runs on"
    finally:
        process.close()
