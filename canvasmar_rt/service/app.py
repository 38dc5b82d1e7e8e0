"""The ASGI application: sessions on `/ws`, the page on `/`, `/healthz` and `/metrics`."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fastapi import FastAPI, Response, WebSocket
from fastapi.responses import FileResponse, JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from canvasmar_rt.errors import StateError
from canvasmar_rt.rollout import Predictor
from canvasmar_rt.service.metrics import Metrics
from canvasmar_rt.service.session import FOREIGN, FULL, SHUTDOWN, UNSTARTED, End, Session
from canvasmar_rt.service.settings import Settings
from canvasmar_rt.service.starts import cut_starts
from canvasmar_rt.service.world import World

PAGE = Path(__file__).parent / "page.html"
JOIN_S = 1.0
"""Seconds to wait for the tick under way when the service ends."""

log = logging.getLogger(__name__)


class Service:
    """The world and its sessions; what `create_app` builds its routes on."""

    def __init__(self, predictor: Predictor, settings: Settings) -> None:
        self.metrics = Metrics()
        self._config, self._settings = predictor.config, settings
        starts = cut_starts(predictor.config, settings.clip)
        self.world = World(predictor, starts, settings, self.metrics)
        self._sessions: set[Session] = set()
        self._nobody = asyncio.Event()
        self._nobody.set()
        self._ending = False

    async def open(self) -> None:
        """Start the model, unless it has been; returns when it is warm, or the world was closed.

        Raises:
            StateError: if the service has ended; it does not begin again.
            CanvasMarError: what the model or engine raised.
        """
        if self._ending:
            raise StateError("this service has ended; make another application with create_app")
        await asyncio.to_thread(self.world.open)

    async def serve(self, websocket: WebSocket) -> None:
        """A client, from its connection to its end."""
        session = Session(websocket, self.world, self._config, self._settings, self.metrics)
        refused = self._refusal(websocket)
        end: End | None = None
        if refused is None:
            self._sessions.add(session)
            self._nobody.clear()
            self.metrics.sessions.inc()
        try:
            end = await session.run(refused)
        finally:
            if refused is None:
                self._sessions.remove(session)
                self.metrics.sessions.dec()
                if not self._sessions:
                    self._nobody.set()
            self.metrics.ends.labels(end.reason if end else "error").inc()

    def _refusal(self, websocket: WebSocket) -> End | None:
        """Why a client is not served, if so. A browser names the page that connects, which for our
        own page is the server it connects to."""
        if self._ending:
            return SHUTDOWN
        if not self.world.opened:
            return UNSTARTED
        page, allowed = websocket.headers.get("origin"), self._settings.origins
        own = websocket.headers.get("host")
        if page is not None and not {page, "*"} & set(allowed) and page.partition("://")[2] != own:
            return FOREIGN
        return FULL if len(self._sessions) >= self._settings.max_sessions else None

    async def end_sessions(self) -> None:
        """Tell every session that the server shuts down, and wait until they are gone."""
        self._ending = True
        for session in self._sessions:
            session.end(SHUTDOWN)
        await self._nobody.wait()

    async def close(self) -> None:
        """End the sessions and the model's thread."""
        await self.end_sessions()
        if not await asyncio.to_thread(self.world.close, JOIN_S):
            log.error("the model's thread did not end within %g s", JOIN_S)


def create_app(predictor: Predictor, settings: Settings | None = None) -> FastAPI:
    """The application; `app.state.service` is its `Service`. It runs once, from the start of its
    lifespan to its end; an application it is mounted in must enter that.

    Raises:
        VideoError: if the clip of the start pictures cannot be read.
        ConfigError: if the budget is more than a tick.
    """
    service = Service(predictor, settings or Settings())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.open()
        yield
        await service.close()

    app = FastAPI(title="canvasmar-rt", lifespan=lifespan, openapi_url=None)
    app.state.service = service

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(PAGE, media_type="text/html", headers={"Cache-Control": "no-cache"})

    @app.get("/healthz")
    async def healthz() -> JSONResponse:
        good = service.world.healthy
        bad = "stuck" if service.world.opened else "not started"
        return JSONResponse({"status": "ok" if good else bad}, 200 if good else 503)

    @app.get("/metrics")
    async def metrics() -> Response:
        text = generate_latest(service.metrics.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    @app.websocket("/ws")
    async def play(websocket: WebSocket) -> None:
        await service.serve(websocket)

    return app
