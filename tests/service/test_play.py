"""The packaged model behind the service: by its library's own client, and in a real browser."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import numpy as np
import pytest

import canvasmar_rt
from canvasmar_rt import rollout
from canvasmar_rt.service.settings import Settings

from .conftest import Client, Running

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
START = 5
"""The gripper is where it can go up, left and right."""
SPEED = 0.03
"""Of the gripper, table widths a pixel frame."""


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout, "MEASURED_FRAMES", 8)  # a rough table is enough here
        # half the speed, so that a busy machine need not fall back on the canvas alone
        settings = Settings(slots=2, fps=5)
        server = Running(canvasmar_rt.load("toytable-int8"), settings)
    with server.clients:
        yield server
        server.stop()


def gripper(frame: np.ndarray) -> np.ndarray:
    """Centre of the magenta gripper in an RGB picture (H, W, 3), pixels (x, y)."""
    r, g, b = np.moveaxis(frame.astype(int), -1, 0)
    y, x = np.nonzero(np.minimum(r, b) - g > 30)
    assert len(x) > 3, "the gripper is not to be seen"
    return np.array([x.mean(), y.mean()])


def strip(client: Client) -> np.ndarray:
    header, raw = client.picture()
    assert not header.canvas
    return np.frombuffer(raw, np.uint8).reshape(2, 64, 64, 3)


def test_the_model_goes_on_from_its_start_and_obeys(running: Running) -> None:
    client = running.connect()
    assert client.hello()["model"] == "toytable"
    starts = running.service.world._starts
    places = []
    for speed in (0, -SPEED):
        client.picture()  # it has a place: what is asked for now is a new start
        client.tell(type="reset", start=START)
        client.picture_of_new_start()
        client.tell(type="action", action=[0, speed] * 2)
        for _ in range(4):
            frames = strip(client)
        places.append(gripper(frames[1]))
    still = np.abs(frames[1].astype(int) - starts[START][-1]).mean()
    assert still < 20, "the table of the start is still there"
    across, down = places[1] - places[0]
    # up, for eight pixel frames, of which some passed before the action arrived
    assert -8 * SPEED * 64 - 2 < down < -6
    assert abs(across) < 5
    client.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium; on Debian: apt-get install chromium")
def test_arrow_keys_move_the_arm_in_a_browser(running: Running) -> None:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no Playwright: pip install playwright"
    )
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(f"http://127.0.0.1:{running.port}/")

        def wait_for_frame(number: int) -> None:
            page.wait_for_function(f"Number($('frame').textContent) >= {number}")

        def picture(which: str = "world") -> np.ndarray:
            data = page.evaluate(
                f"[...$('{which}').getContext('2d').getImageData(0, 0, 64, 64).data]"
            )
            return np.array(data, np.uint8).reshape(64, 64, 4)[..., :3]

        def start(number: int) -> None:
            page.evaluate(f"tell({{type: 'reset', start: {number}}})")
            page.wait_for_function("Number($('frame').textContent) < 2")

        def moved(key: str | None) -> np.ndarray:
            """Pixels the gripper moves in some six ticks with a key held."""
            start(START)
            before = gripper(picture())
            frame = int(page.inner_text("#frame"))
            if key is not None:
                page.keyboard.down(key)
            wait_for_frame(frame + 6)
            if key is not None:
                page.keyboard.up(key)
            return gripper(picture()) - before

        wait_for_frame(6)
        at_rest = moved(None)
        assert np.abs(at_rest).max() < 4
        for key, axis, sign in (("ArrowUp", 1, -1), ("KeyA", 0, -1), ("ArrowRight", 0, 1)):
            there = moved(key) - at_rest
            assert sign * there[axis] > 5, (key, there)
            assert abs(there[1 - axis]) < sign * there[axis], (key, there)

        assert page.is_hidden("#guess")
        page.check("#overlay")
        page.wait_for_function(
            "$('guess').getContext('2d').getImageData(0, 0, 64, 64).data.some((v) => v > 0)"
        )
        assert page.is_visible("#guess")
        start(START)
        wait_for_frame(2)
        assert np.abs(picture("guess").astype(int) - picture()).mean() < 25
        assert float(page.inner_text("#p50")) > 1
        assert page.inner_text("#tick") == "400"
        page.evaluate("socket.close(4000)")
        page.click("text=Connect again")
        wait_for_frame(2)
        page.evaluate("for (let i = 0; i < 3; i += 1) connect()")  # clicks while none answers
        page.wait_for_function("$('note').textContent === ''")
        running.wait_for(lambda: running.metric("canvasmar_sessions") == 1)
        assert errors == []
        browser.close()
