"""Sessions over a real server and sockets, with a rollout that only keeps time."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import socket
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.exceptions import ConnectionClosed

from canvasmar_rt.errors import ConfigError, EngineError, InputError, StateError, VideoError
from canvasmar_rt.service import world
from canvasmar_rt.service.app import create_app
from canvasmar_rt.service.server import Server, bind, run
from canvasmar_rt.service.session import QUEUE
from canvasmar_rt.service.settings import Settings

from .conftest import ACTIONS, Client, FakePredictor, Running

Serve = Callable[..., Running]
ZERO = [0.0] * ACTIONS


def frames_of(client: Client, count: int) -> list[int]:
    return [client.picture()[0].frame for _ in range(count)]


def health(running: Running) -> int:
    try:
        running.get("/healthz")
    except urllib.error.HTTPError as error:
        error.close()
        return error.code
    return 200


def test_a_session_gets_every_frame(serve: Serve, fake: FakePredictor) -> None:
    client = serve(fake).connect()
    assert client.hello() == {
        "type": "hello", "model": "toytable", "width": 16, "height": 16, "frames": 2,
        "tick_ms": 40, "budget_ms": 35, "action_dim": 4, "action_limit": 0.06,
    }  # fmt: skip
    header, strip = client.picture()
    assert (header.canvas, header.format, header.ar_steps, header.deadline_met) == (0, 1, 2, 1)
    assert 0 < header.latency_ms < 35
    assert strip == bytes([1]) * (2 * 16 * 16 * 3)
    assert [header.frame, *frames_of(client, 5)] == [0, 1, 2, 3, 4, 5]


def test_jpeg_is_what_one_gets_unless_asked_otherwise(serve: Serve, fake: FakePredictor) -> None:
    client = serve(fake).connect("")
    client.hello()
    client.tell(type="action", action=[0.05, 0, 0, 0])
    frames_of(client, 3)
    header, strip = client.picture()
    assert header.format == 0
    with Image.open(io.BytesIO(strip)) as picture:
        assert picture.format == "JPEG"
        assert np.abs(np.asarray(picture).astype(int) - 51).max() <= 2
        assert picture.size == (16, 32)


def test_sessions_share_one_batch_and_steer_their_own_row(
    serve: Serve, fake: FakePredictor
) -> None:
    running = serve(fake, slots=3)
    clients = [running.connect() for _ in range(3)]
    for i, client in enumerate(clients):
        client.hello()
        client.picture()
        client.tell(type="action", action=[0.01 * (i + 1), 0, 0, 0])
    time.sleep(0.1)
    for i, client in enumerate(clients):
        frames_of(client, 8)
        assert client.picture()[1][0] == 1 + 10 * (i + 1)
    assert {actions.shape for actions in fake.stepped} == {(3, ACTIONS)}
    assert sorted(fake.seated) == [0, 1, 2]
    batched = [told for told in fake.started if told.get("batch")]
    assert len(batched) == 1
    streams = [told["stream"] for told in fake.started if not told.get("batch")]
    assert len({*streams, 0, 1, 2}) == 6  # nobody draws another's noise, nor an idle row's


def test_who_finds_no_place_waits_and_then_no_more_are_let_in(
    serve: Serve, fake: FakePredictor
) -> None:
    running = serve(fake, slots=1, max_sessions=2)
    first, second = running.connect(), running.connect()
    assert second.hello()["type"] == "hello"
    first.hello()
    assert frames_of(first, 20) == [*range(20)]
    with pytest.raises(TimeoutError):
        second.socket.recv(timeout=0.1)
    third = running.connect()
    assert third.ended() == (1013, "all places are taken; try again later")
    first.close()
    assert frames_of(second, 3) == [0, 1, 2]
    assert running.metric('canvasmar_session_ends_total{reason="full"}') == 1
    assert running.metric("canvasmar_sessions") == 1


BAD: dict[str, tuple[str | bytes, int, str, str]] = {
    "not JSON": ("{", 1007, "malformed", "Invalid JSON"),
    "a number": ("3", 1007, "malformed", "an object"),
    "no type": ('{"action": []}', 1007, "malformed", "type"),
    "unknown type": ('{"type": "cheat"}', 1007, "malformed", "'action', 'reset', 'canvas'"),
    "too short": ('{"type": "action", "action": [0]}', 1007, "malformed", "4 numbers, got 1"),
    "too fast": (
        '{"type": "action", "action": [0, 0, 0, 0.07]}', 1007, "malformed", "within 0.06 of 0"
    ),
    "not finite": (
        '{"type": "action", "action": [0, 0, 0, NaN]}', 1007, "malformed", "finite"
    ),
    "text": ('{"type": "action", "action": "0000"}', 1007, "malformed", "valid array"),
    "an extra": ('{"type": "canvas", "on": true, "x": 1}', 1007, "malformed", "not permitted"),
    "not strict": ('{"type": "canvas", "on": 1}', 1007, "malformed", "valid boolean"),
    "negative": ('{"type": "reset", "start": -1}', 1007, "malformed", "greater than"),
    "binary": (b"\0" * 8, 1007, "malformed", "binary"),
    "large": (json.dumps("x" * 2047), 1009, "oversized", "2049 bytes; 2048 are allowed"),
    "huge": (json.dumps("x" * 100_000), 1009, "oversized", ""),
    "not UTF-8": (b"\xff\xfe", 1007, "malformed", ""),
}  # fmt: skip


def test_a_bad_message_ends_its_own_session_only(serve: Serve, fake: FakePredictor) -> None:
    running = serve(fake, slots=2)
    good = running.connect()
    good.hello()
    good.picture()
    for name, (message, code, _, part) in BAD.items():
        bad = running.connect()
        bad.hello()
        if name == "not UTF-8":
            bad.socket.send(message, text=True)
        else:
            bad.socket.send(message)
        got, reason = bad.ended()
        assert got == code, name
        assert part in reason, (name, reason)
    flooder = running.connect()
    flooder.hello()
    with contextlib.suppress(ConnectionClosed):
        for _ in range(200):
            flooder.tell(type="canvas", on=False)
    assert flooder.ended() == (1008, "more than 60 messages in a second")
    rude = running.connect("?format=gif")
    assert rude.ended() == (1007, "format: one of jpeg, raw")

    seen = frames_of(good, 30)
    assert seen == [*range(seen[0], seen[0] + 30)]
    for reason in ("malformed", "oversized"):
        wanted = sum(kind == reason for _, _, kind, _ in BAD.values()) + (reason == "malformed")
        assert running.metric(f'canvasmar_session_ends_total{{reason="{reason}"}}') == wanted
    assert running.metric('canvasmar_session_ends_total{reason="too_frequent"}') == 1
    assert running.metric('canvasmar_session_ends_total{reason="error"}') == 0


def test_a_connection_that_breaks_gives_its_place_back(serve: Serve, fake: FakePredictor) -> None:
    running = serve(fake, slots=1)
    for _ in range(3):
        gone = running.connect()
        gone.hello()
        gone.picture()
        gone.socket.socket.shutdown(socket.SHUT_RDWR)
        gone.close()
    with socket.create_connection(("127.0.0.1", running.port)) as early:
        early.sendall(b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n")
    client = running.connect()
    client.hello()
    assert frames_of(client, 2) == [0, 1]
    running.wait_for(lambda: running.metric('canvasmar_session_ends_total{reason="left"}') == 3)
    assert running.metric("canvasmar_sessions") == 1


def test_reset_begins_anew_but_not_too_often(serve: Serve, fake: FakePredictor) -> None:
    running = serve(fake)
    client = running.connect()
    client.hello()
    frames_of(client, 3)
    begun = time.monotonic()
    client.tell(type="reset")
    client.tell(type="reset", start=5)  # while a request is pending, the last one stands
    assert client.picture_of_new_start()[0].frame == 0
    assert time.monotonic() - begun > world.RESTART_S - 0.2
    assert len(fake.seated) == 2
    starts = running.service.world._starts
    assert len(starts) == 8
    np.testing.assert_array_equal(fake.started[-1]["context"], starts[5])
    assert frames_of(client, 3) == [1, 2, 3]


def test_rows_that_are_lost_begin_anew(serve: Serve, fake: FakePredictor) -> None:
    """Whether somebody plays there or not."""
    running = serve(fake, slots=3)
    client = running.connect()
    client.hello()
    assert frames_of(client, 2) == [0, 1]
    fake.far |= {2}
    assert frames_of(client, 3) == [2, 3, 4]
    fake.far.clear()  # it came back
    frames_of(client, 12)
    assert fake.seated == [0]
    fake.far |= {2}
    frames_of(client, 12)
    assert fake.seated == [0, 2]
    fake.far |= {0, 1}
    assert client.picture_of_new_start()[0].frame == 0
    frames_of(client, 12)
    assert sorted(fake.seated[2:]) == [0, 1]


def test_a_request_made_while_one_is_granted_is_not_lost(
    serve: Serve, fake: FakePredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "RESTART_S", 0.2)
    running = serve(fake)
    starting = threading.Event()
    start = fake.start

    def slow_start(context: np.ndarray, **told: object) -> object:
        starting.set()
        time.sleep(0.1)
        return start(context, **told)

    monkeypatch.setattr(fake, "start", slow_start)
    client = running.connect()
    client.hello()
    assert starting.wait(5)
    client.tell(type="reset", start=6)
    client.picture_of_new_start()
    np.testing.assert_array_equal(fake.started[-1]["context"], running.service.world._starts[6])


def test_the_canvas_comes_first_to_those_who_ask(serve: Serve, fake: FakePredictor) -> None:
    fake.step_s = 0.01
    running = serve(fake)
    asking, other = running.connect(), running.connect()
    for client in (asking, other):
        client.hello()
        client.picture()
    asking.tell(type="canvas", on=True)
    while not (first := asking.picture())[0].canvas:
        pass
    second = asking.picture()
    assert (first[1][0], second[1][0]) == (7, 1)
    assert first[0].frame == second[0].frame
    assert first[0].latency_ms + 8 < second[0].latency_ms
    asking.tell(type="canvas", on=False)
    time.sleep(0.1)
    kinds = [asking.picture()[0].canvas for _ in range(30)]
    assert not any(kinds[-5:])
    assert not any(other.picture()[0].canvas for _ in range(30))


def test_a_stalled_client_is_closed_and_the_others_notice_nothing(
    serve: Serve, fake: FakePredictor
) -> None:
    fake.size = 128
    fake.__post_init__()
    running = serve(fake, slots=3, stall_s=0.6)
    good = running.connect()
    good.hello()
    stalled = running.connect()
    stalled.hello()
    running.wait_for(lambda: len(fake.seated) == 2)
    first = good.picture()[0].frame
    begun, ticks = time.monotonic(), len(fake.stepped)
    seen = 0
    while not running.metric('canvasmar_session_ends_total{reason="stalled"}') or seen < 25:
        assert time.monotonic() - begun < 8
        last, seen = frames_of(good, 5)[-1], seen + 5
    assert seen >= 0.95 * (last - first)
    assert len(fake.stepped) - ticks >= 0.95 * (time.monotonic() - begun) / 0.04 - 1
    assert running.metric("canvasmar_frames_dropped_total") > QUEUE
    # the connection itself is gone too, although its client still takes nothing
    connections = running.server.server_state.connections
    running.wait_for(lambda: sum(isinstance(c, WebSocketsSansIOProtocol) for c in connections) == 1)
    (left,) = (c for c in connections if isinstance(c, WebSocketsSansIOProtocol))
    assert left.transport.get_write_buffer_limits() == (0, 0)
    assert running.metric("canvasmar_sessions") == 1
    stalled.socket.socket.close()


@contextlib.contextmanager
def flood(running: Running, frame: bytes, first: bytes = b"") -> Iterator[threading.Thread]:
    """A session that sends a frame over and over and reads nothing; the thread ends with it."""
    request = (
        "GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: MDAwMDAwMDAwMDAwMDAwMA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", running.port)) as raw:
        raw.sendall(request.encode())
        assert raw.recv(64).startswith(b"HTTP/1.1 101")

        def send() -> None:
            with contextlib.suppress(OSError):
                raw.sendall(first)
                while True:
                    raw.sendall(frame * 2000)

        thread = threading.Thread(target=send, daemon=True)
        thread.start()
        yield thread
        with contextlib.suppress(OSError):
            raw.shutdown(socket.SHUT_RDWR)
        thread.join(5)


def masked(opcode: int, payload: bytes = b"", *, last: bool = True) -> bytes:
    """A client's frame."""
    return bytes([128 * last + opcode, 128 + len(payload), 0, 0, 0, 0]) + payload


@pytest.mark.parametrize("payload", [b"", b"x" * 125])
def test_pings_are_no_burden(serve: Serve, fake: FakePredictor, payload: bytes) -> None:
    """Nor if nobody takes the answers: they do not pile up, and the connection can be ended."""
    running = serve(fake, slots=1)
    good = running.connect()
    good.hello()
    good.picture()
    with flood(running, masked(9, payload)) as flooding:
        connections = running.server.server_state.connections
        sockets = [c for c in connections if isinstance(c, WebSocketsSansIOProtocol)]
        (bad,) = (c for c in sockets if c.client != good.socket.local_address)
        running.wait_for(lambda: not bad.writable.is_set())
        begun, seen = time.monotonic(), 0
        while time.monotonic() < begun + 2:
            seen += len(frames_of(good, 1))
        assert seen > 15, "the others have their turn"
        assert bad.transport.get_write_buffer_size() < 1 << 16
        assert running.metric("canvasmar_sessions") == 2
        bad.loop.call_soon_threadsafe(bad.keepalive_timeout)
        flooding.join(5)
        assert not flooding.is_alive()
        running.wait_for(lambda: running.metric("canvasmar_sessions") == 1)


def test_a_message_has_an_end(serve: Serve, fake: FakePredictor) -> None:
    running = serve(fake)
    with flood(running, masked(0, last=False), masked(1, last=False)) as flooding:
        flooding.join(5)
        assert not flooding.is_alive()
    ended = 'canvasmar_session_ends_total{reason="oversized"}'
    running.wait_for(lambda: running.metric(ended) == 1)


def test_a_slow_client_gets_the_newest(serve: Serve, fake: FakePredictor) -> None:
    fake.size = 256
    fake.__post_init__()
    running = serve(fake)
    client = running.connect()
    client.hello()
    newest = []
    for _ in range(6):
        time.sleep(0.3)
        newest.append((client.picture()[0].frame, len(fake.stepped)))
    assert running.metric("canvasmar_frames_dropped_total") > 10
    frame, now = newest[-1]
    assert now - frame < 45, "what a slow client sees must not grow older and older"


def test_ticks_keep_their_rate_and_late_ones_are_counted(serve: Serve, fake: FakePredictor) -> None:
    running = serve(fake)
    client = running.connect()
    client.hello()
    client.picture()
    begun = time.monotonic()
    frames_of(client, 25)
    assert time.monotonic() - begun == pytest.approx(1.0, abs=0.1)
    early = running.metric("canvasmar_missed_deadlines_total")
    assert early < 10
    fake.step_s = 0.036
    headers = [client.picture()[0] for _ in range(20)]
    assert not headers[-1].deadline_met
    assert headers[-1].latency_ms > 35
    assert running.metric("canvasmar_missed_deadlines_total") >= early + 17
    assert running.metric('canvasmar_ticks_total{ar_steps="2"}') >= 45
    assert running.metric("canvasmar_tick_latency_seconds_count") >= 45


def test_nobody_there_nothing_done(serve: Serve, fake: FakePredictor) -> None:
    running = serve(fake)
    client = running.connect()
    client.hello()
    client.picture()
    client.close()
    running.wait_for(lambda: running.metric("canvasmar_sessions") == 0)
    time.sleep(0.05)
    ticks = len(fake.stepped)
    time.sleep(0.2)
    assert len(fake.stepped) == ticks
    again = running.connect()
    again.hello()
    header, _ = again.picture()
    assert header.deadline_met, "the first tick after a rest is not late"


def test_a_failing_model_ends_sessions_and_goes_on(serve: Serve, fake: FakePredictor) -> None:
    running = serve(fake)
    client = running.connect()
    client.hello()
    client.picture()
    fake.broken = True
    assert client.ended() == (1011, "the model failed; try again")
    again = running.connect()
    again.hello()
    assert frames_of(again, 2) == [0, 1]
    assert json.loads(running.get("/healthz")) == {"status": "ok"}
    assert running.metric('canvasmar_session_ends_total{reason="failed"}') == 1


def test_a_lost_model_is_said_to_be_so(
    serve: Serve, fake: FakePredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda told: None)
    running = serve(fake)
    client = running.connect()
    client.hello()
    client.picture()
    fake.broken = fake.lost = True
    assert client.ended()[0] == 1011
    running.wait_for(lambda: health(running) == 503)
    again = running.connect()
    assert again.ended()[0] == 1011


def test_a_stuck_model_is_not_healthy(
    serve: Serve, fake: FakePredictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "STUCK_S", 0.1)
    running = serve(fake)
    client = running.connect()
    client.hello()
    client.picture()
    fake.hold.clear()
    time.sleep(0.3)
    assert health(running) == 503
    fake.hold.set()
    running.wait_for(lambda: health(running) == 200)


def test_shutdown_tells_everybody_in_time(fake: FakePredictor) -> None:
    fake.size = 128
    fake.__post_init__()
    running = Running(fake, Settings(slots=2, fps=100))
    playing, stalled, waiting = (running.connect() for _ in range(3))
    for client in (playing, stalled, waiting):
        client.hello()
    running.wait_for(lambda: running.metric("canvasmar_frames_dropped_total") > 0, 8)
    told: list[tuple[int, str]] = []
    readers = [
        threading.Thread(target=lambda c=client: told.append(c.ended()))
        for client in (playing, waiting)
    ]
    for reader in readers:
        reader.start()
    begun = time.monotonic()
    running.stop()
    assert time.monotonic() - begun < 2
    for reader in readers:
        reader.join()
    assert told == [(1001, "the server is shutting down")] * 2
    stalled.socket.socket.close()
    running.clients.close()


def test_shutdown_does_not_wait_for_the_warmup(fake: FakePredictor) -> None:
    fake.warmup_s = 10
    app = create_app(fake, Settings())
    told: list[str] = []
    with bind("127.0.0.1", 0) as listener:
        server = Server(app, Settings(), lambda: told.append("ready"))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        end = time.monotonic() + 5
        while not fake.started:
            assert time.monotonic() < end
            time.sleep(0.01)
        begun = time.monotonic()
        server.should_exit = True
        thread.join(5)
    assert not thread.is_alive()
    assert time.monotonic() - begun < 2
    assert told == []
    assert not app.state.service.world._thread.is_alive()


def test_a_world_closed_before_it_opens_does_not_start(fake: FakePredictor) -> None:
    opened = create_app(fake, Settings()).state.service.world
    assert opened.close(0)
    opened.open()
    assert not fake.started


def test_pages_of_other_servers_do_not_connect(serve: Serve, fake: FakePredictor) -> None:
    running = serve(fake)
    for own in (None, f"http://127.0.0.1:{running.port}"):
        assert running.connect(origin=own).hello()["type"] == "hello"
    for other in ("http://evil.example", "http://127.0.0.1:1", "null", "http://["):
        assert running.connect(origin=other).ended() == (
            1008, "pages of other servers may not connect"
        )  # fmt: skip
    for allowed in ("https://game.example", "*"):
        friendly = serve(fake, origins=(allowed,))
        assert friendly.connect(origin="https://game.example").hello()["type"] == "hello"
    assert running.metric('canvasmar_session_ends_total{reason="foreign"}') == 4


def test_what_the_model_raises_at_its_start_is_raised(
    fake: FakePredictor, capfd: pytest.CaptureFixture[str]
) -> None:
    fake.cold = True
    with pytest.raises(EngineError, match=r"^out of memory$"):
        run(fake, Settings(), host="127.0.0.1", port=0)
    assert capfd.readouterr() == ("", "")


def test_an_application_runs_once_and_wants_to_be_started(fake: FakePredictor) -> None:
    app = create_app(fake, Settings())
    sent: list[Any] = []

    async def receive() -> dict[str, str]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        sent.append(message)

    def ask(kind: str, path: str) -> None:
        scope = {"type": kind, "path": path, "method": "GET", "query_string": b"", "headers": []}
        asyncio.run(app(scope, receive, send))

    async def live() -> None:
        async with app.router.lifespan_context(app):
            assert app.state.service.world.healthy

    ask("http", "/healthz")  # as one that was mounted in another, whose lifespan alone is entered
    assert (sent[0]["status"], sent[1]["body"]) == (503, b'{"status":"not started"}')
    ask("websocket", "/ws")
    assert sent[-1]["code"] == 1011
    assert "must enter its lifespan" in sent[-1]["reason"]
    asyncio.run(live())
    with pytest.raises(StateError, match="make another application"):
        asyncio.run(live())


def test_the_page_is_whole_in_itself(serve: Serve, fake: FakePredictor) -> None:
    page = serve(fake).get("/")
    assert '<canvas id="world">' in page
    assert "http://" not in page
    assert "https://" not in page
    assert "src=" not in page


def test_settings_the_model_cannot_run_with(fake: FakePredictor) -> None:
    for name, value in (
        ("slots", 0), ("max_sessions", 0), ("fps", 0.0), ("stall_s", float("nan")),
        ("budget_ms", -1.0), ("action_limit", float("inf")), ("seed", -1), ("slots", "2"),
        ("seed", 1.5), ("max_message_rate", 1.5), ("fps", "a"), ("clip", 3), ("origins", "*"),
        ("origins", ("https://game.example/",)), ("origins", ("game.example",)),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=name):
            Settings(**{name: value})
    with pytest.raises(ConfigError, match="more than a tick of 200 ms"):
        create_app(fake, Settings(budget_ms=201))
    with pytest.raises(ConfigError, match="fps: a tick would take 2e"):
        create_app(fake, Settings(fps=1e-12))
    with pytest.raises(InputError, match=r"batch 9 is outside the 1\.\.8"):
        create_app(fake, Settings(slots=9))
    with pytest.raises(VideoError):
        create_app(fake, Settings(clip=Settings().clip.with_name("none.npz")))


def test_an_address_that_cannot_be_had() -> None:
    with (
        bind("127.0.0.1", 0) as taken,
        pytest.raises(ConfigError, match="choose another host or port"),
    ):
        bind(*taken.getsockname())
    with pytest.raises(ConfigError, match=r"no\.such\.host\.invalid:80"):
        bind("no.such.host.invalid", 80)


def test_an_address_is_not_shared_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where SO_REUSEADDR means sharing, another option keeps it; one that is harmless stands in."""
    with bind("127.0.0.1", 0) as here:
        assert here.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
    monkeypatch.setattr(socket, "SO_EXCLUSIVEADDRUSE", socket.SO_KEEPALIVE, raising=False)
    with bind("127.0.0.1", 0) as there:
        assert not there.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)
        assert there.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
