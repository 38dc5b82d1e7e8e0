"""What Ray Serve's HTTP proxies add to sessions.

Between a client and its replica Ray queues without end whatever is sent, so that a replica never
notices a client that takes nothing, and when a replica dies its clients get no reason. Proxies that
start with `ENVIRONMENT` keep a short queue for each session, newest pictures first, end a session
that takes none for too long, and say why when the replica is gone.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from canvasmar_rt.service.session import QUEUE
from canvasmar_rt.service.settings import Settings

ENVIRONMENT = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "canvasmar_rt.cluster.proxy.middlewares",
    "RAY_worker_niceness": "0",
}
"""Has to be set where a node of Ray starts. Ray's own niceness for workers, 15, lets anything else
on the machine delay their ticks."""
SERVICE_RESTART = 1012
LOST = "the machine of this session was lost; connect again to begin anew"
MARK = (b"x-canvasmar-proxy", b"1")
"""A header by which replicas know that their sessions come through here."""


def middlewares() -> list[Middleware]:
    """For Ray Serve, which calls this in each of its HTTP proxies."""
    return [Middleware(Outbox)]


class Outbox:
    """ASGI middleware with a short queue between application and client of each WebSocket."""

    def __init__(self, app: ASGIApp, stall_s: float = Settings.stall_s) -> None:
        """`stall_s`: seconds after which a client that takes no data is disconnected."""
        self._app, self._stall_s = app, stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            scope = {**scope, "headers": [*scope["headers"], MARK]}
            await _Session(receive, send, self._stall_s).run(self._app, scope)
        else:
            await self._app(scope, receive, send)


class _Session:
    def __init__(self, receive: Receive, send: Send, stall_s: float) -> None:
        self._receive, self._send, self._stall_s = receive, send, stall_s
        self._waiting: collections.deque[Message] = collections.deque()
        self._changed = asyncio.Event()
        self._accepted = self._ended = False

    async def run(self, app: ASGIApp, scope: Scope) -> None:
        """Run the application until it ends or the client takes nothing any more."""
        served = asyncio.ensure_future(app(scope, self._read, self._put))
        sent = asyncio.create_task(self._send_all(served))
        try:
            await asyncio.wait({served, sent}, return_when=asyncio.FIRST_COMPLETED)
            self._changed.set()
            with contextlib.suppress(TimeoutError, OSError):
                await sent
            if served.done():
                await served
        finally:
            served.cancel()
            sent.cancel()
            await asyncio.gather(served, sent, return_exceptions=True)

    async def _read(self) -> Message:
        message = await self._receive()
        self._ended |= message["type"] == "websocket.disconnect"
        return message

    async def _put(self, message: Message) -> None:
        kind = message["type"]
        if kind.startswith("http."):  # Ray refuses a request so, but this one is a WebSocket's
            message, self._ended = {**message, "type": f"websocket.{kind}"}, True
        self._accepted |= kind == "websocket.accept"
        self._ended |= kind == "websocket.close"
        if "bytes" in message:
            pictures = [i for i, waiting in enumerate(self._waiting) if "bytes" in waiting]
            if len(pictures) == QUEUE:
                del self._waiting[pictures[0]]
        self._waiting.append(message)
        self._changed.set()

    async def _send_all(self, served: asyncio.Future[None]) -> None:
        """Send what waits, until the application has ended.

        Raises:
            TimeoutError: if the client takes nothing.
            OSError: if it has gone.
        """
        while self._waiting or not served.done():
            self._changed.clear()
            if not self._waiting:
                await self._changed.wait()
                continue
            async with asyncio.timeout(self._stall_s):
                await self._send(self._waiting.popleft())
        if self._accepted and not self._ended:
            close = {"type": "websocket.close", "code": SERVICE_RESTART, "reason": LOST}
            async with asyncio.timeout(self._stall_s):
                await self._send(close)
