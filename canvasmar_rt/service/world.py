"""The world that all sessions share: one rollout of a fixed batch, stepped on a thread of its own.

A session has a row of the batch while it plays. Rows without one idle along, so no shape ever
changes; whoever joins, or starts again, is put into a row between two ticks. So is a start of its
own into a row whose latents have left what the model knows: its picture falls apart, and in int8,
whose scales are those of the whole batch, it would take the others' precision.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import logging
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from canvasmar_rt.rollout import Predictor, Rollout
from canvasmar_rt.service.metrics import Metrics
from canvasmar_rt.service.settings import Settings
from canvasmar_rt.service.starts import LATENT_FRAMES

UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]

RESTART_S = 2.0
"""A session may start again this often: each start takes time from a tick of all."""
STUCK_S = 10.0
"""A tick that takes this long will not end."""
LOST = 28.0
"""Normalised latents beyond this, whose variance is one, take the others' precision."""
LOST_TICKS = 8
"""So many running: one may come back."""
POLL_S = 0.1
"""How often a start-up looks whether it is still wanted."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Picture:
    """What a tick shows one session.

    frames: uint8 (t, H, W, 3).
    canvas: whether they are the canvas, which comes before the frames proper.
    frame: ticks since the session's start, from 0.
    latency_ms: milliseconds from the tick's start to these frames.
    ar_steps, deadline_met: of the prediction; 0 and True for a canvas.
    """

    frames: UInt8
    canvas: bool
    frame: int
    latency_ms: float
    ar_steps: int
    deadline_met: bool


class Player:
    """A session as the world sees it. Its callbacks are called on the world's thread."""

    def __init__(
        self, show: Callable[[Picture], None], failed: Callable[[], None], action_dim: int
    ) -> None:
        self.show, self.failed = show, failed
        self.action: Float32 = np.zeros(action_dim, np.float32)
        """Taken at every tick until it is replaced."""
        self.wants_canvas = False
        # The world's own:
        self.start: int | None = None
        self.row: int | None = None
        self.frame = 0
        self.seated_at = -RESTART_S


class World:
    """The rollout, its rows, and the thread that steps them."""

    def __init__(
        self,
        predictor: Predictor,
        starts: Sequence[UInt8],
        settings: Settings,
        metrics: Metrics,
    ) -> None:
        """
        Raises:
            ConfigError: if the budget is more than a tick, or the bundle takes no such batch.
        """
        predictor.bundle.manifest.batch.require(settings.slots)
        self._predictor, self._starts = predictor, starts
        self._settings, self._metrics = settings, metrics
        self._tick_s = settings.tick_s(predictor.config)
        self._budget_s = settings.budget_s(predictor.config)
        self._changed = threading.Condition()
        # All of these are guarded by the condition:
        self._rows: list[Player | None] = [None] * settings.slots
        self._asking: collections.deque[Player] = collections.deque()
        self._closing = False
        # Only the thread writes these:
        self._begun = 0
        self._lost = np.zeros(settings.slots, int)  # ticks that each row has been beyond `LOST`
        self._busy_since: float | None = None
        self._error: BaseException | None = None
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="world", daemon=True)

    # -- for the sessions; from any thread

    def open(self) -> None:
        """Start the thread and wait until the model is warm, or the world is closed.

        Raises:
            CanvasMarError: what the model or engine raised.
        """
        with self._changed:
            if self._closing:
                return
            if self._thread.ident is None:
                self._thread.start()
        while not (self._ready.wait(POLL_S) or self._closing):
            pass
        if self._error is not None and not self._closing:
            raise self._error

    def close(self, timeout: float | None = None) -> bool:
        """Stop after the tick, or graph of the warm-up, under way; whether the thread has ended
        within `timeout` seconds."""
        with self._changed:
            first, self._closing = not self._closing, True
            self._changed.notify()
            if self._thread.ident is None:
                return True
            if first and not self._ready.is_set():  # so it is alive: it needs the lock to go on
                ctypes.pythonapi.PyThreadState_SetAsyncExc(
                    ctypes.c_ulong(self._thread.ident), ctypes.py_object(SystemExit)
                )
        self._thread.join(timeout)
        return not self._thread.is_alive()

    @property
    def opened(self) -> bool:
        """Whether the thread was ever started."""
        return self._thread.ident is not None

    @property
    def healthy(self) -> bool:
        """Whether the thread runs and is not stuck in a tick."""
        since = self._busy_since
        return self._thread.is_alive() and (since is None or time.perf_counter() - since < STUCK_S)

    def ask(self, player: Player, start: int | None = None) -> None:
        """Ask for a place, or, with a place already, for a new start in it: number `start`, or
        the next one in turn. Who asks again before that gets what was asked for last."""
        if not self._thread.is_alive():
            player.failed()
            return
        with self._changed:
            player.start = start
            if player not in self._asking:
                self._asking.append(player)
            self._changed.notify()

    def leave(self, player: Player) -> None:
        """Give the place back. The tick under way may still show the player its frames."""
        with self._changed:
            if player in self._asking:
                self._asking.remove(player)
            if player.row is not None:
                self._rows[player.row] = None
                player.row = None

    # -- the thread

    def _run(self) -> None:
        try:
            rollout = self._predictor.start(
                self._starts[0], batch=self._settings.slots, seed=self._settings.seed
            )
            rollout.warmup(deadlines=True)
            self._warn_if_slow(rollout)
        except BaseException as error:
            self._error = error
            return
        finally:
            with self._changed:
                self._ready.set()
        due = time.perf_counter()
        while self._wait(due):
            now = self._busy_since = time.perf_counter()
            if now - due >= self._tick_s:  # after a rest, or a tick that took two
                due = now
            try:
                self._tick(rollout, due)
                self._seat_one(rollout)
            except Exception:
                log.exception("the model failed; every session is ended, and it starts afresh")
                self._fail_all()
                rollout.reset()
            self._busy_since = None
            due += self._tick_s

    def _warn_if_slow(self, rollout: Rollout) -> None:
        drawn = [rung.p99_ms for rung in rollout.latency if rung.ar_steps]
        if min(drawn) > 1e3 * self._budget_s:
            log.warning(
                "one AR step takes %.0f ms for %d sessions, the budget is %.0f ms: frames will be "
                "the canvas alone, which blurs what moves; take fewer slots or a lower frame rate",
                min(drawn), self._settings.slots, 1e3 * self._budget_s,
            )  # fmt: skip

    def _wait(self, due: float) -> bool:
        """Wait until somebody is there and it is time; False once the world closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._asking or any(self._rows))
            while not self._closing and (left := due - time.perf_counter()) > 0:
                self._changed.wait(left)
            return not self._closing

    def _seated(self) -> dict[int, Player]:
        with self._changed:
            return {row: player for row, player in enumerate(self._rows) if player is not None}

    def _tick(self, rollout: Rollout, due: float) -> None:
        """Predict one latent frame, or a group, and show it to the players."""
        seated = self._seated()
        if not seated:
            return
        deadline = due + self._budget_s
        action_dim = self._predictor.config.action_dim
        actions = np.zeros((self._settings.slots, action_dim), np.float32)
        for row, player in seated.items():
            actions[row] = player.action
        watching = {row: player for row, player in seated.items() if player.wants_canvas}

        def show(
            to: dict[int, Player], frames: UInt8, *, canvas: bool, ar_steps: int, met: bool
        ) -> None:
            latency = time.perf_counter() - due
            if not canvas:
                self._metrics.latency.observe(latency)
            for row, player in to.items():
                player.show(
                    Picture(
                        frames=frames[row], canvas=canvas, frame=player.frame,
                        latency_ms=1e3 * latency, ar_steps=ar_steps, deadline_met=met,
                    )
                )  # fmt: skip

        def show_canvas(frames: UInt8) -> None:
            show(watching, frames, canvas=True, ar_steps=0, met=True)

        prediction = rollout.step(
            actions if action_dim else None,
            budget_ms=max(1.0, 1e3 * (deadline - time.perf_counter())),
            on_canvas=show_canvas if watching else None,
        )
        met = time.perf_counter() <= deadline
        show(seated, prediction.frames, canvas=False, ar_steps=prediction.ar_steps, met=met)
        for player in seated.values():
            player.frame += 1
        self._metrics.ticks.labels(str(prediction.ar_steps)).inc()
        self._metrics.missed.inc(not met)
        furthest = np.abs(prediction.latent).reshape(self._settings.slots, -1).max(axis=1)
        self._lost = np.where(furthest > LOST, self._lost + 1, 0)

    def _seat_one(self, rollout: Rollout) -> None:
        """Put one of those who ask into a row, or a new start into a lost one: at most one a tick,
        so that a crowd at the door does not stop the world."""
        found = self._next()
        if found is None:
            return
        row, player, asked = found
        number = self._begun if asked is None else asked
        single = self._predictor.start(
            self._starts[number % len(self._starts)],
            seed=self._settings.seed,
            stream=self._settings.slots + self._begun,
            clock=rollout.frame - LATENT_FRAMES,
        )
        rollout.seat(row, single.state())
        self._begun += 1
        if player is not None:
            player.frame, player.seated_at = 0, time.perf_counter()

    def _next(self) -> tuple[int, Player | None, int | None] | None:
        """The first who asks and can be seated, taken off the list and given a row, or else who has
        a lost row: the row, the player, if it has one, and the start asked for."""
        now = time.perf_counter()
        with self._changed:
            free = next((i for i, player in enumerate(self._rows) if player is None), None)
            for player in self._asking:
                row = free if player.row is None else player.row
                if row is not None and now - player.seated_at >= RESTART_S:
                    self._asking.remove(player)
                    self._rows[row], player.row = player, row
                    return row, player, player.start
            for row in np.flatnonzero(self._lost >= LOST_TICKS).tolist():
                seated = self._rows[row]
                if seated is None or now - seated.seated_at >= RESTART_S:
                    log.info("row %d has left what the model knows, and begins anew", row)
                    return row, seated, None
        return None

    def _fail_all(self) -> None:
        with self._changed:
            players = {p for p in (*self._rows, *self._asking) if p is not None}
        for player in players:
            player.failed()
