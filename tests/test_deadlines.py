"""Nothing waits for ever: each wait for a thread, a process, a queue, a socket or Ray has a limit, or a reason to need none."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "rlhf_ray"
IN_A_CALL = "it is part of a call of the driver, which has a deadline and a watchdog that ends the rank"
BY_ITS_PARENT = "a child waits for work here, and ends with its parent (processes/ends_with.py)"
BACKGROUND = "the thread in the background waits for calls with deadlines; the watchdog watches the phase"
PENDING = "a result that is pending ends in its value or in a typed error, at the deadline of its call"
FINISHED = "it waits for nothing: the task is done"
WAITS: dict[str, str] = {
    "actors/shells.py call_engines ray.wait": IN_A_CALL,
    "actors/shells.py call_engines ray.get": "it is there: ray.wait has returned it",
    "actors/shells.py _fetched ray.get": IN_A_CALL,
    "engine/saving/writer.py result join": "on a rank it is in a call, with a deadline; in the driver it waits for such calls",
    "engine/universal.py _convert wait": "the conversion of a checkpoint takes what its size takes, and ends with this process",
    "environments/process.py run_child recv": BY_ITS_PARENT,
    "environments/verifiers.py read readline": "the question that it is for has rollout.environment.timeout_s",
    "models/forward/parallel_packs.py __init__ wait": IN_A_CALL,
    "models/forward/parallel_packs.py _run get": "as many modules as threads take one and give it back",
    "processes/child.py _wait recv": "select has said that something is there",
    "processes/lifeline.py _watch recv": "a thread of its own waits for the end of the parent",
    "rewards/function_process.py _run recv": "poll has said that something is there",
    "rewards/function_process.py _start recv": "poll has said that something is there",
    "rewards/function_process.py run_child recv": BY_ITS_PARENT,
    "processes/ends_with.py _look_after poll": "a process of its own waits for the end of one of two others",
    "rewards/mixture.py _results result": PENDING,
    "serving/gateway.py _replicas result": PENDING,
    "serving/gateway.py check result": PENDING,
    "serving/gateway.py _in_loop result": "what it waits for awaits calls with deadlines, and the caller's own call has one",
    "serving/models.py score result": FINISHED,
    "serving/models.py ready result": FINISHED,
    "serving/transport/callers.py while_connected result": FINISHED,
    "trainers/ppo/modes/one_step_off.py result wait": BACKGROUND,
    "trainers/ppo/modes/one_step_off.py settle wait": BACKGROUND,
    "trainers/ppo/modes/windowed.py _next_task wait": "the background waits for the loop to want something",
    "trainers/ppo/modes/windowed.py _wait_for wait_for": BACKGROUND,
    "trainers/ppo/modes/windowed.py collect wait_for": BACKGROUND,
}
"""File, function and call of each wait without a limit, and why it needs none."""
NO_ARGUMENT = {"join", "wait", "get", "acquire", "communicate"}
"""Methods that wait for ever if they are called without any argument."""


def waits(source: str) -> Iterator[tuple[str, str]]:
    """The function and the call of each wait without a limit."""
    tree = ast.parse(source)
    of_futures = any(word in source for word in ("concurrent.futures", "asyncio"))
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}

    def walk(node: ast.AST, function: str) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            function = node.name
        if isinstance(node, ast.Attribute) and id(node) not in called and ast.unparse(node) == "ray.get":
            yield function, "ray.get"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and (name := _endless(node, of_futures)):
            yield function, name
        awaited = isinstance(node, ast.Await)
        for child in ast.iter_child_nodes(node):
            if awaited and isinstance(child, ast.Call):  # the caller's own limit ends what it awaits
                for below in ast.iter_child_nodes(child):
                    yield from walk(below, function)
            else:
                yield from walk(child, function)

    yield from walk(tree, "")


def _endless(call: ast.Call, of_futures: bool) -> str:
    """What the call is, if it may wait for ever; else nothing."""
    assert isinstance(call.func, ast.Attribute)
    name, whole = call.func.attr, ast.unparse(call.func)
    limited = any(word.arg in ("timeout", "timeout_s", "blocking") for word in call.keywords)
    if whole in ("ray.get", "ray.wait"):
        return "" if limited else whole
    if whole == "select.select":
        return "" if len(call.args) == 4 else whole
    if name in ("recv", "recv_bytes"):
        return name
    if name == "readline" and "stdout" in whole:
        return name
    if name == "poll" and not call.args and whole in ("ends.poll", "select.poll"):
        return "" if whole == "select.poll" else name
    if name == "wait_for" and len(call.args) == 1 and not limited:
        return name
    if name == "result" and of_futures and not call.args and not limited and "asyncio" in whole + ast.unparse(call):
        return name
    if name == "result" and of_futures and isinstance(call.func.value, ast.Name | ast.Attribute) and not limited:
        return name
    return name if name in NO_ARGUMENT and not call.args and not call.keywords else ""


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("thread.join()", "join"),
        ("thread.join(3.0)", ""),
        ("' '.join(words)", ""),
        ("process.wait()", "wait"),
        ("process.wait(timeout=3.0)", ""),
        ("queue.get()", "get"),
        ("mapping.get('key')", ""),
        ("ray.get(reference)", "ray.get"),
        ("ray.get(reference, timeout=60)", ""),
        ("map(ray.get, references)", "ray.get"),
        ("ray.wait(references, num_returns=2)", "ray.wait"),
        ("line.recv(64)", "recv"),
        ("condition.wait_for(ready)", "wait_for"),
        ("condition.wait_for(ready, 3.0)", ""),
        ("select.select([line], [], [])", "select.select"),
    ],
)
def test_a_wait_without_a_limit_is_seen(line: str, found: str) -> None:
    assert [name for _, name in waits(f"def f():\n    {line}\n")] == ([found] if found else [])


def test_every_wait_has_a_limit_or_a_reason_why_it_needs_none() -> None:
    found = {
        f"{path.relative_to(ROOT)} {function} {name}"
        for path in sorted(ROOT.rglob("*.py"))
        for function, name in waits(path.read_text(encoding="utf-8"))
    }
    assert sorted(found - WAITS.keys()) == [], "give these a limit, or say here why they need none"
    assert sorted(WAITS.keys() - found) == [], "these are no more"
