"""A proxy before a cluster's dashboard that ends every log connection after a while, as load balancers and port-forwards do."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import aiohttp
from aiohttp import web

PASSED_ON = ("content-type", "authorization", "x-ray-authorization")


class CuttingProxy:
    """Passes everything on to ``target``; log connections end after ``seconds``, in turn with a close frame and without one."""

    def __init__(self, target: str, seconds: float) -> None:
        self.target = target
        self.seconds = seconds
        self.cuts: list[str] = []
        self.address = ""

    @contextmanager
    def running(self) -> Iterator[CuttingProxy]:
        """Serve in a thread of its own during the block."""
        loop, ready = asyncio.new_event_loop(), threading.Event()

        async def start() -> None:
            app = web.Application(client_max_size=2**28)
            app.router.add_route("*", "/{tail:.*}", self._handle)
            runner = web.AppRunner(app, shutdown_timeout=0.1)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            host, port = runner.addresses[0]
            self.address = f"http://{host}:{port}"
            ready.set()

        thread = threading.Thread(target=lambda: (loop.run_until_complete(start()), loop.run_forever()), daemon=True)
        thread.start()
        assert ready.wait(30)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(timeout=30)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        url = f"{self.target}{request.rel_url}"
        headers = {name: value for name, value in request.headers.items() if name.lower() in PASSED_ON}
        async with aiohttp.ClientSession(headers=headers) as session:
            if request.headers.get("Upgrade", "").lower() == "websocket":
                return await self._log(request, session, url)
            async with session.request(request.method, url, data=await request.read()) as answer:
                body, kind = await answer.read(), answer.headers.get("Content-Type", "text/plain")
                return web.Response(status=answer.status, body=body, headers={"Content-Type": kind})

    async def _log(self, request: web.Request, session: aiohttp.ClientSession, url: str) -> web.StreamResponse:
        down = web.WebSocketResponse()
        await down.prepare(request)
        async with session.ws_connect(url) as up:

            async def pump() -> None:
                async for message in up:
                    if message.type == aiohttp.WSMsgType.TEXT:
                        await down.send_str(message.data)

            try:
                await asyncio.wait_for(pump(), self.seconds)
            except TimeoutError:
                self.cuts.append("close" if len(self.cuts) % 2 == 0 else "abort")
                if self.cuts[-1] == "abort" and request.transport is not None:
                    request.transport.abort()
                    return down
            await down.close(code=1000)
        return down
