"""Environments of the package verifiers as an environment of ours, and their tasks as rows on disk.

    python -m rlhf_ray.environments.verifiers PYTHON TASKSET FILE [--rows N] [--folder FOLDER] [KEY=VALUE ...]

verifiers runs in a process with a Python of its own (``verifiers_server.py``). What its agent asks of its model is what our
policy answers next.

Invariants: the policy reads the messages that the environment wrote, and each turn begins with all messages before it, letter
for letter, or the episode has failed. The reward of an episode is the one that verifiers gives it, and stands at its last turn.
An episode that failed there has failed here, and with its process ends the one that asked it.
"""

from __future__ import annotations

import argparse
import atexit
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

from rlhf_ray.environments.protocol import Answer, ProcessLost, Task, Turn
from rlhf_ray.environments.settings import parse_settings
from rlhf_ray.errors import RequestError, RlhfRayError
from rlhf_ray.storage.atomic import write_file

SERVER = Path(__file__).with_name("verifiers_server.py")
END_LIMIT_S = 10.0
"""How long it may take to end."""


class Server:
    """The process that runs verifiers; :class:`RequestError` where it does not start."""

    def __init__(self, python: str, taskset: str, folder: str) -> None:
        self.numbers, self.python = count(), python
        self.lines: dict[int, dict[str, Any]] = {}
        """The last line of each episode that nobody has read yet."""
        command = [python, str(SERVER), taskset, str(Path(folder).resolve())]
        environment = dict(os.environ)
        environment.pop("PYTHONPATH", None)  # packages of this Python
        direct = environment.get("no_proxy") or environment.get("NO_PROXY")
        environment |= dict.fromkeys(("no_proxy", "NO_PROXY"), ",".join(filter(None, (direct, "127.0.0.1"))))
        try:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
        except OSError as error:
            raise RequestError(
                f"python {python!r}: {error}; name the interpreter of an environment with verifiers"
            ) from error
        atexit.register(self.close)
        ready = self.read()
        if "error" in ready:
            raise RequestError(f"verifiers in {python} cannot make the environment {taskset}: {ready['error']}")

    def write(self, **line: Any) -> None:
        """Send a line."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(line) + "\n")
            self.process.stdin.flush()
        except OSError:
            self._died()

    def read(self) -> dict[str, Any]:
        """The next line; :class:`RequestError` where the process has ended."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self._died()
        read: dict[str, Any] = json.loads(line)
        return read

    def wait(self, episode: int) -> dict[str, Any]:
        """The next line of an episode."""
        while episode not in self.lines:
            line = self.read()
            self.lines[line["episode"]] = line
        return self.lines.pop(episode)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):  # the kernel ends it once it can be interrupted
            self.process.wait(END_LIMIT_S)
        with suppress(OSError):  # lines that it has not read
            self.process.stdin.close()

    def _died(self) -> None:
        try:
            how = f"ended with {self.process.wait(END_LIMIT_S)}"
        except subprocess.TimeoutExpired:
            how = f"closed its output and did not end within {END_LIMIT_S:g} s"
        raise RequestError(f"the process of verifiers ({self.python}) {how}: its messages on standard error say why")


@contextmanager
def _process_ends_too() -> Iterator[None]:
    """Ends the environment's process with that of verifiers, so that the other episodes are played again."""
    try:
        yield
    except RequestError as error:
        raise ProcessLost(str(error)) from error


@cache
def server_of(python: str, taskset: str, folder: str) -> Server:
    """The one process of this process for these environments."""
    return Server(python, taskset, folder)


class Verifiers:
    """An episode of an environment of verifiers.

    ``python`` is the interpreter of the virtual environment that has verifiers 0.4.0, ``taskset`` verifiers' configuration of
    the taskset (``id`` and its settings), ``folder`` where the module of the taskset lies if it is not installed.
    """

    def __init__(self, python: str, taskset: Mapping[str, Any], folder: str = ".") -> None:
        self.server = server_of(python, json.dumps(taskset, sort_keys=True), folder)
        self.episode = next(self.server.numbers)
        self.ended = True

    def reset(self, task: Task) -> None:
        """Begin with a task whose row :func:`make_rows` wrote."""
        if not isinstance(task.label, dict) or task.messages is None:
            raise RequestError(
                "the prompt is no task of verifiers: make rows with python -m rlhf_ray.environments.verifiers, and set "
                "data.label_key to label"
            )
        self._write(start=self.episode, task=task.label)
        self.ended = False
        self.known = [dict(message) for message in task.messages]
        first = self._next()
        if "messages" not in first:
            raise RequestError(f"the episode ended before its first turn, with {first}")
        if added := self._added(first["messages"]):
            raise RuntimeError(f"the environment begins with messages that the row does not have: {added}")

    def step(self, answer: Answer) -> Turn:
        """Hand an answer to the environment."""
        self._write(answer=self.episode, text=answer.text, finished=answer.finished)
        self.known.append({"role": "assistant", "content": answer.text})
        line = self._next()
        if "reward" in line:
            return Turn(line["reward"])
        return Turn(0.0, done=False, observation=self._added(line["messages"]))

    def _write(self, **line: Any) -> None:
        with _process_ends_too():
            self.server.write(**line)

    def _next(self) -> dict[str, Any]:
        with _process_ends_too():
            line = self.server.wait(self.episode)
        self.ended = "messages" not in line
        if "error" in line:
            raise RuntimeError(f"verifiers: {line['error']}")
        return line

    def _added(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The messages after those that are known, which then are known too."""
        seen = [{"role": message["role"], "content": message.get("content") or ""} for message in messages]
        past = [{"role": message["role"], "content": message.get("content") or ""} for message in self.known]
        for number, message in enumerate(past):
            if seen[number : number + 1] != [message]:
                raise RuntimeError(
                    f"the environment wrote message {number} anew, which the policy has read or answered already: "
                    f"{seen[number : number + 1]} where {message} was"
                )
        self.known = seen
        return seen[len(past) :]

    def __del__(self) -> None:
        """End an episode over there that nobody goes on with here."""
        if not getattr(self, "ended", True) and self.server.process.poll() is None:
            with suppress(RequestError):  # it has ended just now
                self.server.write(drop=self.episode)


def make_rows(python: str, taskset: Mapping[str, Any], count: int, folder: str = ".") -> list[dict[str, Any]]:
    """The first ``count`` tasks of a taskset, or all it has, as rows for ``data.path``.

    Raises :class:`RequestError` for a task without messages, and where verifiers does not start.
    """
    server = server_of(python, json.dumps(taskset, sort_keys=True), folder)
    server.write(tasks=count)
    rows: list[dict[str, Any]] = server.read()["tasks"]
    for number, row in enumerate(rows):
        if not row["prompt"]:
            raise RequestError(
                f"task {number} of {taskset.get('id')} has no prompt: its user speaks first, and a row needs a prompt"
            )
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the rows of one taskset."""
    parser = argparse.ArgumentParser(prog="python -m rlhf_ray.environments.verifiers", description=__doc__)
    parser.add_argument("python", help="interpreter of the environment that has verifiers")
    parser.add_argument("taskset", help="its id in verifiers, such as guess_taskset")
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", type=int, default=1000, help="rows at most (default 1000)")
    parser.add_argument("--folder", default=".", help="where the taskset's module lies, if it is not installed")
    parser.add_argument("settings", nargs="*", help="settings of the taskset")
    given = parser.parse_intermixed_args(arguments)
    try:
        taskset = {"id": given.taskset, **parse_settings(given.settings)}
        rows = make_rows(given.python, taskset, given.rows, given.folder)
        given.file.parent.mkdir(parents=True, exist_ok=True)
        write_file(given.file, "".join(json.dumps(row) + "\n" for row in rows))
    except RlhfRayError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
