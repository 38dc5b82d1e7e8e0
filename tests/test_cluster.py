"""On a local Ray of two workers: what a killed worker was at is done again, and sessions elsewhere
go on."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray.serve", reason='no Ray: pip install "canvasmar-rt[cluster]"')
pytest.importorskip("ray.data", reason='no Ray: pip install "canvasmar-rt[cluster]"')

import ray
import uvicorn
from ray import cloudpickle, serve
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.types import ASGIApp
from starlette.websockets import WebSocket
from typer.testing import CliRunner
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

import canvasmar_rt
from canvasmar_rt import predict, rollout
from canvasmar_rt.bundle import DEMO_CLIP, Bundle
from canvasmar_rt.cluster import __main__ as command
from canvasmar_rt.cluster import predict as cluster_predict
from canvasmar_rt.cluster import service
from canvasmar_rt.cluster.predict import LIVES, predict_folder
from canvasmar_rt.cluster.proxy import ENVIRONMENT, LOST, SERVICE_RESTART, Outbox
from canvasmar_rt.cluster.service import Replicas, application
from canvasmar_rt.cluster.worker import Worker
from canvasmar_rt.errors import BundleError, CanvasMarError, ConfigError, EngineError, InputError
from canvasmar_rt.predict import PredictOptions, predict_clip
from canvasmar_rt.rollout import Predictor
from canvasmar_rt.service.protocol import Header, unpack
from canvasmar_rt.service.server import bind
from canvasmar_rt.service.settings import Settings

# Ray warns of what it does itself; what we do with Ray stays an error
pytestmark = pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\.")

LAST = "c3"
"""Its first worker is killed when it is about to write the video."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Marked(Worker):
    """A worker that leaves its process id in `folder` and takes little time to warm up."""

    folder: Path

    def load(self) -> Predictor:
        write = predict.write_clip

        def write_or_die(path: Path, *rest: Any) -> list[Path]:
            once = self.folder / "killed"
            if path.stem == LAST and not once.exists():
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return write(path, *rest)

        (self.folder / f"{os.getpid()}.pid").touch()
        predict.write_clip = write_or_die
        rollout.MEASURED_FRAMES = 4
        return super().load()

    def pids(self) -> list[int]:
        """Of the workers there ever were, oldest first."""
        files = sorted(self.folder.glob("*.pid"), key=lambda file: file.stat().st_mtime_ns)
        return [int(file.stem) for file in files]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Two (logical) CPUs, on this machine alone."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    slow = {f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S": "60" for check in ("READY", "HEALTH")}
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp") as folder:
        for name, value in (ENVIRONMENT | slow | {"RAY_USAGE_STATS_ENABLED": "0"}).items():
            patch.setenv(name, value)
        ray.init(
            "local", num_cpus=2, include_dashboard=False, log_to_driver=False,
            logging_level="error", _temp_dir=folder,
        )  # fmt: skip
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """c0.npz to c3.npz, pieces of the demo clip, and one that cannot be read."""
    folder = tmp_path_factory.mktemp("clips")
    with np.load(DEMO_CLIP) as demo:
        frames = demo["frames"]
    for i in range(4):
        np.savez(folder / f"c{i}.npz", frames=frames[4 * i : 4 * i + 5])
    (folder / "broken.mp4").write_bytes(b"not a video")
    return folder


def test_a_killed_worker_loses_no_clip(
    local_ray: None, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = Marked(cpus=1, folder=tmp_path)
    options = PredictOptions(frames=4, seed=3)
    seen: list[tuple[int, int]] = []
    report = predict_folder(
        clips, tmp_path / "out", options, worker, workers=2,
        progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert (tmp_path / "killed").exists()
    assert len(worker.pids()) == 3, "another worker took the killed one's place"
    assert [path.stem for path in report.done] == ["c0", "c1", "c2", "c3"]
    assert [clip.name for clip in report.failed] == ["broken.mp4"]
    assert "cannot be decoded" in next(iter(report.failed.values()))
    assert seen == [(i, 5) for i in range(6)]
    plain = canvasmar_rt.load("toytable-int8", threads=1)
    for clip in sorted(clips.glob("*.npz")):
        predict_clip(plain, clip, tmp_path / "plain" / f"{clip.stem}.mp4", options)
    for path in sorted((tmp_path / "plain").iterdir()):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert not list((tmp_path / "out").glob(".*")), "nothing half-written is left"

    (clips / "broken.mp4").unlink()
    monkeypatch.setattr(command, "_connect", lambda address, cpus, gpus: None)
    again_with = ["-o", str(tmp_path / "out"), "--frames", "4", "--seed", "3"]
    again = CliRunner().invoke(command.app, ["predict", str(clips), *again_with])
    assert again.exit_code == 0
    assert "0 predicted, 4 there already, 0 failed" in again.stderr


def test_what_is_done_and_what_is_given_up(clips: Path, tmp_path: Path) -> None:
    """A clip is done only if it was made from the same; one that kills workers is given up."""
    options = PredictOptions(frames=2)
    bundle = Bundle.open(Worker().model).fingerprint
    work = cluster_predict._Predict(worker=Worker(), fingerprint=bundle, options=options)
    clip, target = clips / "c0.npz", tmp_path / "c0.mp4"
    record = cluster_predict._record(clip, bundle, options)
    row = {"clip": str(clip), "target": str(target), "record": json.dumps(record)}
    fine = {"clip": str(clip), "error": "", "refusal": ""}
    path = tmp_path / "c0.json"
    path.write_text(json.dumps({"begun": LIVES - 1}))
    assert work(row) == fine
    assert cluster_predict._is_done(target, record)
    for other in (
        cluster_predict._record(clip, "another", options),
        cluster_predict._record(clips / "c1.npz", bundle, options),
        cluster_predict._record(clip, bundle, dataclasses.replace(options, seed=1)),
    ):
        assert not cluster_predict._is_done(target, other)
    target.unlink()
    assert not cluster_predict._is_done(target, record)
    path.write_text(json.dumps({"begun": LIVES}))
    assert f"{LIVES} workers died" in work(row)["error"]
    for worker, name, message in (
        (Worker(), "another", "another than"),
        (Worker(engine="tensorrt"), bundle, "runs on cuda"),
    ):
        cannot = cluster_predict._Predict(worker=worker, fingerprint=name, options=options)
        assert message in cannot(row)["refusal"]


def test_a_killed_replica_ends_its_own_sessions_only(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "MORE_S", 0.0)
    worker = Marked(cpus=1, folder=tmp_path)
    with bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    app = application(worker, Settings(slots=2, max_sessions=4), Replicas(most=2, sessions=1))
    serve.run(app, name="test")
    with contextlib.ExitStack() as stack:

        def join() -> ClientConnection:
            url = f"ws://127.0.0.1:{port}/ws?format=raw"
            client = stack.enter_context(connect(url, compression=None, proxy=None))
            assert json.loads(client.recv(timeout=60))["model"] == "toytable"
            picture(client)
            return client

        first = [join(), join()]
        wait_for(lambda: running(2))
        other = join()
        killed, kept = worker.pids()
        os.kill(killed, signal.SIGKILL)
        for client in first:
            drain(client)
            assert (client.close_code, client.close_reason) == (SERVICE_RESTART, LOST)
        before = picture(other).frame
        newcomer = join()
        assert picture(newcomer).frame < picture(other).frame
        assert picture(other).frame > before
        os.kill(kept, 0)
    serve.shutdown()


def picture(client: ClientConnection) -> Header:
    """The next picture's header."""
    message = client.recv(timeout=60)
    assert isinstance(message, bytes)
    return unpack(message)[0]


def running(replicas: int) -> bool:
    deployment = serve.status().applications["test"].deployments["world"]
    return deployment.replica_states.get("RUNNING", 0) == replicas


def wait_for(condition: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.1)


def drain(client: ClientConnection) -> list[bytes | str]:
    """What still comes until the connection is closed."""
    messages = []
    with contextlib.suppress(ConnectionClosed):
        while True:
            messages.append(client.recv(timeout=60))
    return messages


@pytest.fixture
def listening() -> Iterator[Callable[[ASGIApp], str]]:
    """Serves an application from a thread; gives its address."""
    with contextlib.ExitStack() as stack:

        def start(app: ASGIApp) -> str:
            server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))
            listener = stack.enter_context(bind("127.0.0.1", 0))
            listener.listen()  # so that clients wait for the server
            thread = threading.Thread(target=server.run, args=([listener],))
            thread.start()
            stack.callback(thread.join, 10)
            stack.callback(setattr, server, "should_exit", True)
            return f"ws://127.0.0.1:{listener.getsockname()[1]}/"

        yield start


def test_the_proxy_drops_pictures_and_then_the_client(
    listening: Callable[[ASGIApp], str],
) -> None:
    sent: list[int] = []

    async def play(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.send_text("hello")
        while True:
            sent.append(len(sent))
            await websocket.send_bytes(struct.pack("<I", sent[-1]) + bytes(1_000_000))
            await asyncio.sleep(0.005)

    def quiet() -> bool:
        before = len(sent)
        time.sleep(0.2)
        return len(sent) == before

    url = listening(Outbox(Starlette(routes=[WebSocketRoute("/", play)]), stall_s=0.5))
    with connect(url, compression=None, proxy=None, max_queue=1, max_size=None) as client:
        assert client.recv(timeout=10) == "hello"
        taken = [0]
        while taken[-1] < len(taken) + 10:  # a slow client; at first the kernel keeps some for it
            assert len(taken) < 100, "none is dropped"
            time.sleep(0.05)
            message = client.recv(timeout=10)
            assert isinstance(message, bytes)
            taken.append(struct.unpack_from("<I", message)[0])
        assert taken == sorted(taken), "newer ones come later"
        wait_for(quiet, 10)  # and now it stalls
        drain(client)
        assert client.close_code != 1000


def test_sessions_have_to_come_through_the_proxy(listening: Callable[[ASGIApp], str]) -> None:
    async def play(websocket: WebSocket) -> None:
        await websocket.accept()
        await websocket.close(1000)

    app = service._Marked(Starlette(routes=[WebSocketRoute("/", play)]))
    for chain, code in ((app, 1011), (Outbox(app), 1000)):
        with connect(listening(chain), proxy=None) as client:
            drain(client)
            assert client.close_code == code


def test_files_of_others_are_left_alone(clips: Path, tmp_path: Path) -> None:
    """A record takes no other file's place, a video no clip's; told before Ray is there."""
    films = tmp_path / "films"
    films.mkdir()
    (films / "a.mp4").write_bytes(b"a video")
    with pytest.raises(InputError, match="the clips themselves lie there"):
        predict_folder(films, films, PredictOptions(), Worker(), workers=1)
    shutil.rmtree(films)
    labels = tmp_path / "c2.json"
    labels.write_text('{"label": "push"}')
    with pytest.raises(InputError, match=r"c2\.json: no record of an earlier run"):
        predict_folder(clips, tmp_path, PredictOptions(), Worker(), workers=1)
    assert labels.read_text() == '{"label": "push"}'
    assert list(tmp_path.iterdir()) == [labels]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["predict", "nowhere", "-o", "out"], CanvasMarError, "nowhere"),
        (["predict", ".", "-o", "out", "--model", "nope"], BundleError, "nope"),
        (["predict", ".", "-o", "out", "--workers", "0"], ConfigError, "workers"),
        (["serve", "--model", "nope"], BundleError, "nope"),
        (["serve", "--profile", "slow"], ConfigError, "slow"),
        (["serve", "--clip", "nowhere.mp4"], CanvasMarError, "nowhere.mp4"),
    ],
)
def test_mistakes_are_told_before_ray_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], error: type[Exception], message: str,
) -> None:  # fmt: skip
    def started(*_: object, **__: object) -> None:
        raise AssertionError("Ray was started")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "init", started)
    found = CliRunner().invoke(command.app, arguments).exception
    assert isinstance(found, error)
    assert message in str(found)


@pytest.mark.parametrize("error", [ConnectionError, ValueError, RuntimeError])
def test_a_cluster_that_is_not_there_is_named(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error("no such cluster\nand more")

    monkeypatch.setattr(ray, "init", fail)
    arguments = ["predict", str(clips), "-o", str(tmp_path), "--address", "auto"]
    found = CliRunner().invoke(command.app, arguments).exception
    assert isinstance(found, EngineError)
    assert "auto: no Ray cluster is to be had there (no such cluster)" in str(found)


def test_a_machine_without_a_gpu_does_not_wait_for_one(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    for more, message in (("--gpus", "0 GPUs"), ("--cpus", "2 CPUs")):
        arguments = ["predict", str(clips), "-o", str(tmp_path), more, "3"]
        found = CliRunner().invoke(command.app, arguments).exception
        assert isinstance(found, EngineError)
        assert f"{more} 3: Ray finds {message} on this machine" in str(found)


def test_an_address_where_nobody_listens_is_told_at_once(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("Ray would wait for minutes"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    arguments = ["predict", str(clips), "-o", str(tmp_path), "--address", f"127.0.0.1:{port}"]
    found = CliRunner().invoke(command.app, arguments).exception
    assert isinstance(found, EngineError)
    assert f"127.0.0.1:{port}: no Ray cluster is to be had there" in str(found)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Worker(cpus=0), "CPUs or GPUs"),
        (lambda: Replicas(least=2, most=1), "least <= most"),
        (lambda: Replicas(sessions=0), "sessions"),
    ],
)
def test_mistakes_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()
