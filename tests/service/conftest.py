"""A server in a thread, and a predictor that predicts nothing but keeps time."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
import time
import types
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from canvasmar_rt.bundle import BatchRange
from canvasmar_rt.config import preset
from canvasmar_rt.deadline import Rung
from canvasmar_rt.errors import EngineError
from canvasmar_rt.service.app import create_app
from canvasmar_rt.service.protocol import Header, unpack
from canvasmar_rt.service.server import Server, bind
from canvasmar_rt.service.settings import Settings

ACTIONS = 4


@dataclasses.dataclass
class FakePredictor:
    """Rollouts whose every pixel of row b is 1 + 1000 times row b's first action; a canvas is 7."""

    size: int = 16
    step_s: float = 0.0
    broken: bool = False
    """The next step fails, once."""
    lost: bool = False
    """There is no way back after that."""
    warmup_s: float = 0.0
    cold: bool = False
    """It cannot be warmed up."""
    started: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    stepped: list[np.ndarray] = dataclasses.field(default_factory=list)
    seated: list[int] = dataclasses.field(default_factory=list)
    far: set[int] = dataclasses.field(default_factory=set)
    """Rows whose latents are of no picture, until another video is seated there."""
    hold: threading.Event = dataclasses.field(default_factory=threading.Event)
    """Cleared, steps do not end."""

    def __post_init__(self) -> None:
        config, _ = preset("toytable")
        ae = dataclasses.replace(config.autoencoder, height=self.size, width=self.size)
        self.config = dataclasses.replace(config, autoencoder=ae, action_dim=ACTIONS)
        batch = BatchRange(minimum=1, optimum=1, maximum=8)
        manifest = types.SimpleNamespace(batch=batch)
        self.bundle = types.SimpleNamespace(manifest=manifest)
        self.hold.set()

    def start(self, context: np.ndarray, **told: Any) -> FakeRollout:
        self.started.append({"context": context, **told})
        return FakeRollout(self, told.get("batch", 1), told.get("clock", 0) + 3)


class FakeRollout:
    def __init__(self, predictor: FakePredictor, batch: int, frame: int) -> None:
        self.predictor, self.batch, self.frame = predictor, batch, frame
        self.first = frame
        step_ms = 1e3 * predictor.step_s
        self.latency = [Rung(ar_steps=2, flow_steps=3, guided=True, p50_ms=step_ms, p99_ms=step_ms)]

    def warmup(self, *, deadlines: bool) -> None:
        assert deadlines
        if self.predictor.cold:
            raise EngineError("out of memory")
        end = time.monotonic() + self.predictor.warmup_s
        while time.monotonic() < end:
            time.sleep(0.01)

    def state(self) -> int:
        assert self.batch == 1
        return self.frame

    def seat(self, row: int, state: int) -> None:
        assert state == self.frame
        self.predictor.seated.append(row)
        self.predictor.far.discard(row)

    def reset(self) -> None:
        if self.predictor.lost:
            raise EngineError("lost")
        self.frame = self.first

    def step(
        self, actions: np.ndarray, *, budget_ms: float, on_canvas: Callable[..., None] | None
    ) -> Any:
        p = self.predictor
        assert p.hold.wait(10)
        if p.broken:
            p.broken = False
            raise EngineError("not finite")
        shape = (self.batch, 2, p.size, p.size, 3)
        if on_canvas is not None:
            on_canvas(np.full(shape, 7, np.uint8))
        time.sleep(p.step_s)
        p.stepped.append(actions.copy())
        self.frame += 1
        pixels = (1 + np.round(1000 * actions[:, :1])).astype(np.uint8)
        frames = np.broadcast_to(pixels.reshape(-1, 1, 1, 1, 1), shape).copy()
        latent = np.ones((self.batch, 64, 4), np.float32)
        for row in p.far:
            latent[row, 9, 2] = -29.0
        return types.SimpleNamespace(frames=frames, latent=latent, ar_steps=2)


class Running:
    """A server in a thread."""

    def __init__(self, predictor: Any, settings: Settings) -> None:
        self.clients = contextlib.ExitStack()
        self.app = create_app(predictor, settings)
        self.service = self.app.state.service
        self.listener: socket.socket = bind("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        up = threading.Event()
        self.server = Server(self.app, settings, up.set)
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],), daemon=True)
        self.thread.start()
        while not up.wait(0.1):
            assert self.thread.is_alive(), "the server did not start"

    def connect(self, query: str = "?format=raw", origin: str | None = None) -> Client:
        url = f"ws://127.0.0.1:{self.port}/ws{query}"
        page = None if origin is None else Origin(origin)
        client = connect(url, compression=None, proxy=None, origin=page)
        return Client(self.clients.enter_context(client))

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as answer:
            return answer.read().decode()

    def metric(self, name: str) -> float:
        """The value of a line of /metrics, 0 if it is not there."""
        lines = dict(line.rsplit(" ", 1) for line in self.get("/metrics").splitlines())
        return float(lines.get(name, 0))

    def wait_for(self, condition: Callable[[], bool], seconds: float = 5.0) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, "it did not come true"
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()
        assert not self.service.world._thread.is_alive()


class Client:
    def __init__(self, connection: ClientConnection) -> None:
        self.socket = connection
        self.frame = -1
        """Of the latest picture."""

    def hello(self) -> dict[str, Any]:
        return json.loads(self.socket.recv(timeout=5))

    def tell(self, **message: Any) -> None:
        self.socket.send(json.dumps(message))

    def picture(self) -> tuple[Header, bytes]:
        message = self.socket.recv(timeout=5)
        assert isinstance(message, bytes)
        picture = unpack(message)
        self.frame = picture[0].frame
        return picture

    def picture_of_new_start(self) -> tuple[Header, bytes]:
        """The first picture whose number is not above the one before."""
        last = self.frame
        while (picture := self.picture())[0].frame > last:
            last = self.frame
        return picture

    def ended(self) -> tuple[int, str]:
        """Close code and reason, once the session has ended."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                self.socket.recv(timeout=5)
        return self.socket.close_code or 0, self.socket.close_reason or ""

    def close(self) -> None:
        self.socket.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., Running]]:
    """Starts a server of a predictor with settings; stops it at the end."""
    with contextlib.ExitStack() as stack:

        def start(predictor: Any, **settings: Any) -> Running:
            running = Running(predictor, Settings(**{"fps": 50, "budget_ms": 35, **settings}))
            stack.enter_context(running.clients)
            stack.callback(running.stop)
            return running

        yield start


@pytest.fixture
def fake() -> FakePredictor:
    return FakePredictor()
