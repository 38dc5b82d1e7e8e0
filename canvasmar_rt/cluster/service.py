"""The service on Ray Serve: a world in each replica, sessions spread over them.

A WebSocket is one long request to Serve: it stays with the replica it was given to, and Serve
counts sessions as it counts requests.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.config import AutoscalingConfig
from starlette.types import ASGIApp, Receive, Scope, Send

from canvasmar_rt.cluster.proxy import MARK
from canvasmar_rt.cluster.worker import Worker
from canvasmar_rt.errors import ConfigError, EngineError
from canvasmar_rt.service.app import create_app
from canvasmar_rt.service.settings import Settings

SPARE = 8
"""Requests a replica takes besides its sessions: pages, `/healthz`, refusals."""
HEALTH_S = 5.0
"""Seconds between health checks."""
DRAIN_S = 60.0
"""Seconds the sessions of a replica that is to go have left."""
MORE_S, FEWER_S = 10.0, 600.0
"""Seconds of too many and of too few sessions before replicas come and go."""
UNMARKED = "Ray was started without the environment that docs/cluster.md asks for"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replicas:
    """How many there are: between `least` and `most`, so many that there are `sessions` to each (as
    many as play at once, `Settings.slots`, if None)."""

    least: int = 1
    most: int = 1
    sessions: float | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most:
            raise ConfigError(
                f"replicas: expected 1 <= least <= most, got {self.least} and {self.most}"
            )
        if self.sessions is not None and not self.sessions > 0:
            raise ConfigError(f"sessions: expected more than 0 a replica, got {self.sessions}")


class _Marked:
    """ASGI middleware that refuses sessions which do not come through `cluster.proxy`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket" and MARK not in map(tuple, scope["headers"]):
            await receive()
            await send({"type": "websocket.accept"})
            await send({"type": "websocket.close", "code": 1011, "reason": UNMARKED})
        else:
            await self._app(scope, receive, send)


class World:
    """A replica: the service's application around one model."""

    def __init__(self, worker: Worker, settings: Settings) -> None:
        self._service_app = create_app(worker.load(), settings)
        self._service_app.add_middleware(_Marked)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._service_app

    def check_health(self) -> None:
        """Serve replaces a replica that raises here three times in a row."""
        if not self._service_app.state.service.world.healthy:
            raise EngineError("the world is stuck in a tick")


def application(worker: Worker, settings: Settings, replicas: Replicas) -> serve.Application:
    """The service, for `serve.run`."""
    deployment: Any = serve.deployment(
        serve.ingress()(World),
        name="world",
        ray_actor_options=worker.resources,
        max_ongoing_requests=settings.max_sessions + SPARE,
        max_queued_requests=settings.max_sessions,
        autoscaling_config=AutoscalingConfig(
            min_replicas=replicas.least,
            max_replicas=replicas.most,
            target_ongoing_requests=replicas.sessions or settings.slots,
            upscale_delay_s=MORE_S,
            downscale_delay_s=FEWER_S,
        ),
        health_check_period_s=HEALTH_S,
        graceful_shutdown_timeout_s=DRAIN_S,
    )
    bound: serve.Application = deployment.bind(worker, settings)
    return bound
