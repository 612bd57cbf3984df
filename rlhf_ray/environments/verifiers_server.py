"""Runs environments of the package verifiers for ``Verifiers`` (``verifiers.py``), with a Python of their own.

    PYTHON verifiers_server.py TASKSET FOLDER

TASKSET is verifiers' configuration of a taskset as JSON, such as {"id": "guess_taskset"}; FOLDER may hold its module.

verifiers 0.4.0 pins older versions of mcp and openai than ours, so that it lives in a virtual environment of its own. This file
runs there: it needs the standard library, verifiers and what verifiers brings, and of this project one file that needs no more.

Lines of JSON come in at standard input: ``{"tasks": N}``, ``{"start": EPISODE, "task": DATA}``, ``{"answer": EPISODE, "text":
..., "finished": ...}`` and ``{"drop": EPISODE}``. Lines go out at what was standard output: ``{"tasks": [...]}``, and of an
episode the ``messages`` that the policy is to answer, its ``reward``, or its ``error``. What environments print goes to
standard error.

Invariants: nothing leaves this machine, since the policy's endpoint is here, at 127.0.0.1, and programs run as local
processes; an episode ends in a reward or in an error, never in both; an error is never a reward, and neither is what a deadline
cut off; what the process holds does not grow with the episodes that have ended; with its input the process ends, whatever an
environment does.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import json
import os
import resource
import runpy
import sys
import types
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

HARNESS = "rlhf_ray_chat"
"""The module that verifiers is told to load its agent's program from."""
EPISODES_PER_CLIENT = 500
"""How many episodes share a client. verifiers 0.4.0 keeps each client until the end, so that there are few, and gives it 1000
connections, each of which waits for one answer of the policy."""
OPEN_FILES = 65536
"""How many files the process may have open, where the system lets it: an episode has four ends of connections."""
GRACE_S = 5.0
"""How long the process may take to end by itself once its input has ended."""


class Server:
    """The environments of one taskset, and the endpoint that their agent asks."""

    def __init__(self, taskset: dict[str, Any], out: Any) -> None:
        self.vf, self.out = importlib.import_module("verifiers.v1"), out
        self.web = importlib.import_module("aiohttp.web")
        loaders = importlib.import_module("verifiers.v1.utils.loaders")
        register_harness(self.vf)
        agent = {"harness": {"id": HARNESS}, "runtime": {"type": "subprocess"}, "network_notice": False}
        config = loaders.resolve_env_config({"taskset": taskset, "agent": agent})
        self.env = loaders.load_environment(config)
        self.answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self.running: dict[int, asyncio.Task[None]] = {}
        self.episodes_of: Counter[int] = Counter()
        """How many episodes under way each client has, by its number."""
        self.url = ""

    def send(self, line: dict[str, Any]) -> None:
        """Write a line."""
        self.out.write(json.dumps(line) + "\n")
        self.out.flush()

    async def serve(self) -> None:
        """Answer lines until there are no more."""
        application = self.web.Application(client_max_size=2**30)
        application.router.add_post("/{client}/chat/completions", self.complete)
        runner = self.web.AppRunner(application, shutdown_timeout=1.0)
        await runner.setup()
        site = self.web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        loop, lines = asyncio.get_running_loop(), asyncio.StreamReader(limit=2**30)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        async with self.env.serving():
            self.send({"ready": True})
            while line := await lines.readline():
                self.take(json.loads(line))
            playing = list(self.running.values())
            for episode in [*self.running]:
                self.drop(episode)
            await asyncio.gather(*playing, return_exceptions=True)
        await runner.cleanup()

    def take(self, line: dict[str, Any]) -> None:
        """Do what a line says."""
        if "tasks" in line:
            self.send({"tasks": [row_of(task.data) for task in self.env.taskset.take(line["tasks"])]})
        elif "start" in line:
            episode = line["start"]
            self.running[episode] = asyncio.ensure_future(self.play(episode, line["task"]))
        elif "answer" in line:
            waiting = self.answers.pop(line["answer"], None)
            if waiting is not None and not waiting.done():
                waiting.set_result(line)
        else:
            self.drop(line["drop"])

    def drop(self, episode: int) -> None:
        """End an episode that nobody goes on with."""
        for waiting in (self.running.pop(episode, None), self.answers.pop(episode, None)):
            if waiting is not None:
                waiting.cancel()

    async def play(self, episode: int, data: dict[str, Any]) -> None:
        """Play an episode to its end."""
        number = next(one for one in count() if self.episodes_of[one] < EPISODES_PER_CLIENT)
        self.episodes_of[number] += 1
        try:
            kind = type(self.env.taskset).task_type()
            task = kind(kind.data_type().model_validate(data), self.env.config.taskset.task)
            client = self.vf.EvalClientConfig(base_url=f"{self.url}/{number}", api_key_var="RLHF_RAY_NO_KEY")
            (slot,) = self.env.slots(task)
            outcome = outcome_of(await self.env.run_slot(slot, self.vf.ModelContext(model=str(episode), client=client)))
        except Exception as error:  # an environment is somebody else's program, and fails in its own ways
            outcome = {"error": f"{type(error).__name__}: {error}"}
        finally:
            self.episodes_of[number] -= 1
        self.running.pop(episode, None)
        self.send({"episode": episode, **outcome})

    async def complete(self, request: Any) -> Any:
        """The endpoint: hands the messages on, and waits for the policy's answer."""
        body = await request.json()
        episode = int(body["model"])
        waiting: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self.answers[episode] = waiting
        self.send({"episode": episode, "messages": body["messages"]})
        answer = await waiting
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": answer["text"]},
            "finish_reason": "stop" if answer["finished"] else "length",
        }
        usage = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}
        reply = {"id": f"policy-{episode}", "object": "chat.completion", "created": 0, "model": "policy"}
        return self.web.json_response({**reply, "choices": [choice], "usage": usage})


def outcome_of(record: Any) -> dict[str, Any]:
    """How an episode of verifiers ended: its ``reward``, or its ``error``."""
    errors = [error.message for part in (record, *record.traces) for error in part.errors]
    if not record.ok or errors:
        return {"error": "; ".join(errors) or "it ended without a reward"}
    if len(record.traces) != 1:
        return {"error": f"it has {len(record.traces)} agents, and a policy plays one"}
    (trace,) = record.traces
    if record.is_timeout or trace.is_timeout:  # which verifiers takes for no error, and scores what there is
        return {"error": f"a deadline of verifiers ended it ({trace.stop_condition}): raise timeout of its task"}
    return {"reward": float(trace.reward)} if trace.rewards else {"error": "its task gives no reward"}


def row_of(data: Any) -> dict[str, Any]:
    """A task as a row: the messages that the policy answers first, and the whole task."""
    prompt = data.prompt if data.prompt is not None else []
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [plain(one) for one in prompt]
    if data.system_prompt is not None:
        messages.insert(0, {"role": "system", "content": data.system_prompt})
    return {"prompt": messages, "label": data.model_dump(mode="json")}


def plain(message: Any) -> dict[str, Any]:
    """A message as the endpoint is sent it."""
    dumped: dict[str, Any] = (
        message if isinstance(message, dict) else message.model_dump(mode="json", exclude_none=True)
    )
    return dumped


def register_harness(vf: Any) -> None:
    """Make the agent's program, which asks the policy once for each turn and runs nothing, known to verifiers.

    Its own programs (such as ``null``) are started through uv, which downloads what they need. A task with tools is refused by
    verifiers, since this one does not say that it supports them.
    """
    httpx = importlib.import_module("httpx")
    client = httpx.AsyncClient(timeout=None, trust_env=False, limits=httpx.Limits(max_connections=None))

    async def launch(
        self: Any, ctx: Any, trace: Any, runtime: Any, endpoint: str, secret: str, mcp_urls: Any, data: Any
    ) -> Any:
        body = {"model": ctx.model, "messages": row_of(data)["prompt"]}
        url, headers = f"{endpoint}/chat/completions", {"Authorization": f"Bearer {secret}"}
        response = await client.post(url, json=body, headers=headers)
        text = "" if response.status_code == 200 else response.text
        return vf.ProgramResult(exit_code=int(bool(text)), stdout="", stderr=text)

    marks = {"APPENDS_SYSTEM_PROMPT": True, "SUPPORTS_RESUME": True, "EXECUTES_CODE": False, "NEEDS_CONTAINER": False}
    module: Any = types.ModuleType(HARNESS)
    base = vf.Harness[vf.HarnessConfig]
    module.PolicyHarness = types.new_class(
        "PolicyHarness", (base,), exec_body=lambda body: body.update(marks, launch=launch)
    )
    module.__all__ = ["PolicyHarness"]
    module.__spec__ = importlib.util.spec_from_loader(HARNESS, loader=None)
    sys.modules[HARNESS] = module


def main() -> None:
    """Serve the taskset that the command line names."""
    ends_with = runpy.run_path(str(Path(__file__).parents[1] / "processes" / "ends_with.py"))
    ends_with["end_with"](0, GRACE_S)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = OPEN_FILES if most == resource.RLIM_INFINITY else min(most, OPEN_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, most))
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an environment prints must not stand among the lines
    sys.path[0] = sys.argv[2]  # in place of the folder of this file, whose neighbours have names of packages
    try:
        server = Server(json.loads(sys.argv[1]), out)
    except Exception as error:
        out.write(json.dumps({"error": f"{type(error).__name__}: {error}"}) + "\n")
        out.flush()
        return
    asyncio.run(server.serve())


if __name__ == "__main__":
    main()
