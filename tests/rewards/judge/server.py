"""A judge on this machine: a real HTTP server that speaks chat completions and replies as a test says."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Reply:
    """What the server does with one request."""

    content: Any = None
    status: int = 200
    wait_s: float = 0.0
    finish: str = "stop"
    usage: Any = field(default_factory=lambda: {"prompt_tokens": 30, "completion_tokens": 10})
    body: bytes | None = None
    """The whole body, in the place of a chat completion."""
    headers: Mapping[str, str] = field(default_factory=dict)
    hang_up: bool = False


Behave = Callable[[Mapping[str, Any], int], "Reply | str"]
"""Takes the body of a request and its number, from 0."""


@dataclass
class JudgeServer:
    """A running server, and what it has seen."""

    url: str
    requests: list[Mapping[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0


@contextmanager
def judge_server(behave: Behave) -> Iterator[JudgeServer]:
    """A server that replies what ``behave`` returns, for the time of the block."""
    lock, at_once = threading.Lock(), 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        wbufsize = -1  # a reply is one packet: the second of two would wait for the first to be acknowledged

        def do_POST(self) -> None:
            nonlocal at_once
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                number = len(server.requests)
                server.requests.append(body)
                server.keys.append(self.headers.get("authorization"))
                at_once += 1
                server.most_at_once = max(server.most_at_once, at_once)
            try:
                self._reply(behave(body, number))
            except (BrokenPipeError, ConnectionResetError):
                pass
            finally:
                with lock:
                    at_once -= 1

        def _reply(self, reply: Reply | str) -> None:
            reply = Reply(reply) if isinstance(reply, str) else reply
            time.sleep(reply.wait_s)
            if reply.hang_up:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            content = reply.body if reply.body is not None else json.dumps(completion(reply)).encode()
            self.send_response(reply.status)
            for name, value in {"content-length": str(len(content)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 256  # the default of 5 resets connections of a judge that asks many questions at once

    http = Server(("127.0.0.1", 0), Handler)
    server = JudgeServer(f"http://127.0.0.1:{http.server_port}/v1")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        http.shutdown()
        http.server_close()
        thread.join(10)


def completion(reply: Reply) -> Mapping[str, Any]:
    """The body of a chat completion."""
    choice = {"index": 0, "message": {"role": "assistant", "content": reply.content}, "finish_reason": reply.finish}
    return {"object": "chat.completion", "choices": [choice], "usage": reply.usage}


def material(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a request shows the judge."""
    return json.loads(body["messages"][1]["content"])  # type: ignore[no-any-return]
