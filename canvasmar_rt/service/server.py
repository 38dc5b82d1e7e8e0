"""uvicorn, told what this service needs of a server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from typing import Any, cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from uvicorn.server import ServerState
from websockets.frames import CloseCode, Frame

from canvasmar_rt.errors import ConfigError
from canvasmar_rt.rollout import Predictor
from canvasmar_rt.service.app import create_app
from canvasmar_rt.service.settings import Settings
from canvasmar_rt.service.world import POLL_S

SEND_BUFFER = 32 << 10
"""Bytes the kernel keeps for a client that does not read: pictures that wait there grow old."""
SLACK = 16
"""A message this many times too large is not even read to its end."""
READ_BYTES = 4 << 10
"""Read of a connection at a time."""
MOST_PARTS = 64
"""Of a message."""
GRACE_S = 1
"""Seconds that connections have to end when the server does."""
BACKLOG = 128
"""Connections that may wait to be accepted."""


class _Connection(WebSocketsSansIOProtocol):
    """A WebSocket connection that holds little unsent data and that the application can abort."""

    def __init__(
        self,
        config: uvicorn.Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        **rest: Any,
    ) -> None:
        app_state = {**app_state, "abort": lambda: self.transport.abort()}
        super().__init__(config, server_state, app_state, **rest)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        connection = cast(socket.socket, transport.get_extra_info("socket"))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)
        cast(asyncio.Transport, transport).set_write_buffer_limits(high=0)
        # of many small frames, no more at once than leaves the other sessions their turn
        cast(Any, transport).max_size = READ_BYTES
        super().connection_made(transport)

    def handle_ping(self) -> None:
        if self.writable.is_set():
            super().handle_ping()
        else:
            self.conn.data_to_send()  # who does not take the answers would have them pile up

    def handle_cont(self, event: Frame) -> None:
        super().handle_cont(event)
        if len(self.frames) > MOST_PARTS and not self.close_sent:  # empty ones add no size
            self.conn.fail(CloseCode.MESSAGE_TOO_BIG, "a message in too many parts")
            self.handle_parser_exception()

    def keepalive_timeout(self) -> None:
        super().keepalive_timeout()
        if not self.writable.is_set():  # closing would wait until the rest is taken
            self.transport.abort()


class Server(uvicorn.Server):
    """Ends the sessions, each with its reason, before uvicorn closes the connections."""

    def __init__(
        self, app: FastAPI, settings: Settings, ready: Callable[[], None] = lambda: None
    ) -> None:
        """`ready` is called once, when clients can connect."""
        self._service, self._ready = app.state.service, ready
        config = uvicorn.Config(
            app, loop="asyncio", ws=_Connection, log_level="warning", ws_per_message_deflate=False,
            ws_max_size=SLACK * settings.max_message_bytes, timeout_graceful_shutdown=GRACE_S,
        )  # fmt: skip
        super().__init__(config)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        watch = asyncio.create_task(self._give_up_when_told())
        await self._service.open()  # here its errors are ours, in the lifespan uvicorn logs them
        await super().startup(sockets)
        watch.cancel()
        if not self.should_exit:
            self._ready()

    async def _give_up_when_told(self) -> None:
        """Stop the model's warm-up, which takes seconds, if the server is to end before it does."""
        while not self.should_exit:
            await asyncio.sleep(POLL_S)
        self._service.world.close(0)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await self._service.end_sessions()
        await super().shutdown(sockets)


def run(
    predictor: Predictor,
    settings: Settings,
    *,
    host: str,
    port: int,
    ready: Callable[[str], None] = lambda url: None,
) -> None:
    """Serve until SIGINT or SIGTERM; `ready` is called with the page's address once it is up.

    Raises:
        ConfigError: if the address cannot be had, or for settings the model cannot run with.
        CanvasMarError: what the model or engine raised when it was warmed up.
        VideoError: if the clip of the start pictures cannot be read.
    """
    app = create_app(predictor, settings)
    with bind(host, port) as listener:
        name = f"[{host}]" if ":" in host else host
        url = f"http://{name}:{listener.getsockname()[1]}/"
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again at its end
            Server(app, settings, lambda: ready(url)).run(sockets=[listener])


def bind(host: str, port: int) -> socket.socket:
    """A listening socket, so that no other server takes its address; port 0 takes a free one.

    Raises:
        ConfigError: if the address cannot be had.
    """
    bound: socket.socket | None = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        # on Windows SO_REUSEADDR would share the address with whoever has it
        option = getattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_REUSEADDR)
        bound.setsockopt(socket.SOL_SOCKET, option, 1)
        bound.bind(address)
        bound.listen(BACKLOG)
    except OSError as error:
        if bound is not None:
            bound.close()
        raise ConfigError(
            f"{host}:{port}: cannot listen there ({error}); choose another host or port"
        ) from None
    return bound
