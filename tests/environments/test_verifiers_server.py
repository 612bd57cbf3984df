"""The process of verifiers ends whatever an environment does, keeps few clients, and takes nothing cut off for a reward."""

from __future__ import annotations

import asyncio
import io
import json
import select
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest

from rlhf_ray.environments import verifiers_server

START = f"import runpy, os, re; names = runpy.run_path({verifiers_server.__file__!r})['main'].__globals__"
RUN = "names.update(GRACE_S=0.1, Server=serve); names['main']()"


def served(body):
    """The process of verifiers, with ``body`` in place of verifiers, when it has begun."""
    program = f"{START}\ndef serve(taskset, out): print('begun', file=out, flush=True); {body}\n{RUN}"
    command = [sys.executable, "-c", program, "{}", "."]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    assert process.stdout.readline() == b"begun\n"
    return process


def ended(process):
    """Whether what the process writes ends within some seconds."""
    return bool(select.select([process.stdout], [], [], 10.0)[0]) and process.stdout.read() == b""


def test_its_process_ends_with_its_input_while_an_environment_keeps_the_interpreter():
    process = served('re.match("(a+)+$", "a" * 64 + "b")')
    try:
        process.stdin.close()
        assert ended(process), "its input has ended, and it runs on"
    finally:
        process.kill()
        process.wait()


def test_nothing_holds_its_output_open_when_it_has_ended():
    process = served("os._exit(3)")
    assert process.wait(10.0) == 3
    assert ended(process), "whoever reads its lines waits for ever"
    process.stdin.close()


def test_clients_are_as_few_as_the_episodes_at_once_need_and_no_more_with_each_that_ends():
    met = Counter()

    async def run_slot(slot, context):
        met[context.client] += 1
        await asyncio.sleep(0)
        return SimpleNamespace(
            errors=[], ok=True, is_timeout=False,
            traces=[SimpleNamespace(errors=[], is_timeout=False, rewards=["right"], reward=float(context.model))],
        )  # fmt: skip

    class Taskset:
        @staticmethod
        def task_type():
            kind = SimpleNamespace(model_validate=dict)
            return type("Kind", (), {"__init__": lambda *_: None, "data_type": staticmethod(lambda: kind)})

    server = object.__new__(verifiers_server.Server)
    server.out, server.url, server.running, server.episodes_of = io.StringIO(), "http://here", {}, Counter()
    server.vf = SimpleNamespace(EvalClientConfig=lambda base_url, api_key_var: base_url, ModelContext=SimpleNamespace)
    server.env = SimpleNamespace(
        taskset=Taskset(), config=SimpleNamespace(taskset=SimpleNamespace(task=None)),
        slots=lambda task: [task], run_slot=run_slot,
    )  # fmt: skip

    async def step(count):
        await asyncio.gather(*(server.play(episode, {}) for episode in range(count)))

    for _ in range(3):
        asyncio.run(step(1200))
    assert met == {"http://here/0": 1500, "http://here/1": 1500, "http://here/2": 600}
    lines = [json.loads(line) for line in server.out.getvalue().splitlines()]
    assert lines[:1200] == [{"episode": number, "reward": float(number)} for number in range(1200)]


@pytest.mark.parametrize("late", ["episode", "trace"])
def test_what_a_deadline_of_verifiers_cut_off_is_no_reward(late):
    trace = SimpleNamespace(
        errors=[], is_timeout=late == "trace", stop_condition="agent_timeout", rewards=[1], reward=1.0
    )
    record = SimpleNamespace(errors=[], ok=True, is_timeout=late == "episode", traces=[trace])
    assert "a deadline of verifiers ended it" in verifiers_server.outcome_of(record).get("error", "no error")
    record.is_timeout = trace.is_timeout = False
    assert verifiers_server.outcome_of(record) == {"reward": 1.0}
