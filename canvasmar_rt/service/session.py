"""One client: what it sends is checked, what it is shown waits in a short queue, newest first."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
from collections.abc import Callable

import numpy as np
from fastapi import WebSocket, WebSocketDisconnect
from fastapi.websockets import WebSocketState

from canvasmar_rt.config import ModelConfig
from canvasmar_rt.errors import InputError
from canvasmar_rt.service.metrics import Metrics
from canvasmar_rt.service.protocol import FORMATS, Action, Canvas, pack, read_text
from canvasmar_rt.service.settings import Settings
from canvasmar_rt.service.world import Picture, Player, World

QUEUE = 3
"""Pictures kept for a slow client; the oldest makes way."""
CLOSE_S = 0.5
"""Seconds a client has to take the close message."""
REASON_BYTES = 123
"""What a close frame can carry (RFC 6455, 5.5)."""


@dataclasses.dataclass(frozen=True)
class End:
    """Why a session ends: a word for the metrics, the close code and a text for the client."""

    reason: str
    code: int
    text: str


LEFT = End("left", 1000, "")
SHUTDOWN = End("shutdown", 1001, "the server is shutting down")
MALFORMED = End("malformed", 1007, "not a message of this protocol")
TOO_FREQUENT = End("too_frequent", 1008, "too many messages in a second")
STALLED = End("stalled", 1008, "pictures were not taken for too long")
OVERSIZED = End("oversized", 1009, "a message was too large")
UNSTARTED = End(
    "unstarted", 1011, "the application was not started: its server, or the one around it, must "
    "enter its lifespan"
)  # fmt: skip
FOREIGN = End("foreign", 1008, "pages of other servers may not connect")
FAILED = End("failed", 1011, "the model failed; try again")
FULL = End("full", 1013, "all places are taken; try again later")


class Session:
    """A client's session, on the event loop."""

    def __init__(
        self,
        websocket: WebSocket,
        world: World,
        config: ModelConfig,
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        self._websocket, self._world = websocket, world
        self._config, self._settings, self._metrics = config, settings, metrics
        self._loop = asyncio.get_running_loop()
        self._told_to_end: asyncio.Future[End] = self._loop.create_future()
        self._queue: collections.deque[Picture] = collections.deque()
        self._filled = asyncio.Event()
        self._format = websocket.query_params.get("format", FORMATS[0])
        self.player = Player(
            lambda picture: self._soon(lambda: self._put(picture)),
            lambda: self._soon(lambda: self.end(FAILED)),
            config.action_dim,
        )

    def end(self, end: End) -> None:
        """End the session; the first reason given stands."""
        if not self._told_to_end.done():
            self._told_to_end.set_result(end)

    async def run(self, refused: End | None = None) -> End:
        """Serve the client until the session ends, or only tell it why it is `refused`."""
        end = LEFT
        with contextlib.suppress(WebSocketDisconnect, OSError):
            await self._websocket.accept()
            end = refused or await self._play()
            if self._websocket.client_state is not WebSocketState.DISCONNECTED:
                await self._close(end)
        return end

    async def _play(self) -> End:
        if self._format not in FORMATS:
            return dataclasses.replace(MALFORMED, text=f"format: one of {', '.join(FORMATS)}")
        await self._websocket.send_json(self._hello())
        self._world.ask(self.player)
        tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._send())]
        try:
            done, _ = await asyncio.wait(
                {*tasks, self._told_to_end}, return_when=asyncio.FIRST_COMPLETED
            )
            ends = [task.result() for task in done]
            return next((end for end in ends if end is not LEFT), LEFT)
        finally:
            self._world.leave(self.player)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _hello(self) -> dict[str, object]:
        ae = self._config.autoencoder
        return {
            "type": "hello",
            "model": self._config.name,
            "width": ae.width,
            "height": ae.height,
            "frames": self._config.step_frames,
            "tick_ms": 1e3 * self._settings.tick_s(self._config),
            "budget_ms": round(1e3 * self._settings.budget_s(self._config), 3),
            "action_dim": self._config.action_dim,
            "action_limit": self._settings.action_limit,
        }

    async def _receive(self) -> End:
        limit, rate = self._settings.max_message_bytes, self._settings.max_message_rate
        times: collections.deque[float] = collections.deque(maxlen=rate)
        while True:
            message = await self._websocket.receive()
            if message["type"] == "websocket.disconnect":
                # these two codes come from uvicorn, which has told the client
                return {1007: MALFORMED, 1009: OVERSIZED}.get(message["code"], LEFT)
            text = message.get("text")
            size = len(message["bytes"]) if text is None else len(text.encode())
            if size > limit:
                return dataclasses.replace(
                    OVERSIZED, text=f"a message of {size} bytes; {limit} are allowed"
                )
            now = self._loop.time()
            if len(times) == rate and now - times[0] < 1:
                return dataclasses.replace(
                    TOO_FREQUENT, text=f"more than {rate} messages in a second"
                )
            times.append(now)
            if text is None:
                return dataclasses.replace(MALFORMED, text="binary; messages are JSON texts")
            try:
                self._obey(text)
            except InputError as error:
                return dataclasses.replace(MALFORMED, text=str(error))

    def _obey(self, text: str) -> None:
        told = read_text(text, self._config.action_dim, self._settings.action_limit)
        if isinstance(told, Action):
            self.player.action = np.array(told.action, np.float32)
        elif isinstance(told, Canvas):
            self.player.wants_canvas = told.on
        else:
            self._world.ask(self.player, told.start)

    async def _send(self) -> End:
        while True:
            await self._filled.wait()
            picture = self._queue.popleft()
            if not self._queue:
                self._filled.clear()
            message = await asyncio.to_thread(pack, picture, self._format)
            try:
                async with asyncio.timeout(self._settings.stall_s):
                    await self._websocket.send_bytes(message)
            except TimeoutError:
                return STALLED
            except (WebSocketDisconnect, RuntimeError):  # the latter once uvicorn has closed it
                return LEFT
            self._metrics.sent.inc()

    def _put(self, picture: Picture) -> None:
        if len(self._queue) == QUEUE:
            self._queue.popleft()
            self._metrics.dropped.inc()
        self._queue.append(picture)
        self._filled.set()

    def _soon(self, call: Callable[[], None]) -> None:
        """From the world's thread to the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to be told
            self._loop.call_soon_threadsafe(call)

    async def _close(self, end: End) -> None:
        reason = end.text.encode()[:REASON_BYTES].decode(errors="ignore")
        try:
            async with asyncio.timeout(CLOSE_S):
                with contextlib.suppress(RuntimeError):  # uvicorn has closed it
                    await self._websocket.close(end.code, reason)
        except TimeoutError:
            # what is still to be sent will never be taken: the server must not wait for that
            abort: Callable[[], None] | None = getattr(self._websocket.state, "abort", None)
            if abort is not None:
                abort()
