"""Predictor and Rollout: the few-step autoregressive loop over a bundle's components.

A `Rollout` checks what comes in, keeps time and draws the noise; its program, made when it starts,
owns every array it will ever need and runs the engine over them (`canvasmar_rt.engines.program`).
Letters as in `canvasmar_rt.config`; t is pixel frames per latent frame.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from canvasmar_rt.bundle import Bundle
from canvasmar_rt.config import SamplingConfig
from canvasmar_rt.deadline import Deadlines, Rung, Timed, ladder
from canvasmar_rt.engines import Engine, create
from canvasmar_rt.engines.memory import STORAGE
from canvasmar_rt.engines.program import (
    Clock,
    Float32,
    Int64,
    Level,
    NoiseAhead,
    NoiseKey,
    UInt8,
    state_shapes,
)
from canvasmar_rt.errors import ConfigError, InputError, StateError

Array = npt.NDArray[Any]
P = ParamSpec("P")
R = TypeVar("R")

MEASURED_FRAMES = 40
"""Of each rung of the ladder, at warm-up."""
FRAMES = "an array of frames of one size"
LATEST = 2**40
"""Of a clock: frames may be counted on from it in 64 bits."""


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Prediction:
    """One predicted latent frame, or group of them; all arrays are the caller's own.

    frames: uint8 RGB (B, t, H, W, 3), the t pixel frames it decodes to ((B, 1, H, W, 3) for the
        first frame of a video made from nothing, which stands for one pixel frame).
    latent: float32 (B, N, C), normalised latents in raster order.
    canvas: float32 (B, N, C), the blurred guess of the latent frame (eq. 5); None without a canvas.
    canvas_frames: uint8 like `frames`, the canvas decoded; None unless asked for.
    staticness: float32 (B, h, w) in 0..1, larger is stiller (eq. 7); None without a canvas.
    order: int64 (B, N), token positions in the order they were drawn; (B, 0) where the canvas
        stands alone.
    frame: index of this latent frame in the video, context included.
    ar_steps, flow_steps: how it was drawn; 0 where it is the canvas alone, for want of time.
    guided: whether classifier-free guidance was used.
    deadline_met: whether it was ready within the budget; None without one.
    timings: seconds spent in each component, in `noise` and in `total`.

    A next-group model predicts J latent frames at once: frames and canvas_frames have J*t (from
    nothing 1 + (J-1)*t) pixel frames, latent, canvas, staticness and order an axis J behind B, and
    `frame` is that of the first.
    """

    frames: UInt8
    latent: Float32
    canvas: Float32 | None
    canvas_frames: UInt8 | None
    staticness: Float32 | None
    order: Int64
    frame: int
    ar_steps: int
    flow_steps: int
    guided: bool
    deadline_met: bool | None
    timings: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RolloutState:
    """A copy of everything a rollout carries from frame to frame; arrays by name, and scalars.
    `bundle` is the fingerprint of the bundle it belongs to, `since` the frame with which each video
    began."""

    arrays: Mapping[str, Array]
    bundle: str
    seed: int
    streams: tuple[int, ...]
    since: tuple[int, ...]
    time: int
    unobserved: int
    encoder_current: bool


def load(
    path_or_name: str | Path,
    *,
    engine: str = "onnxruntime",
    device: str = "cpu",
    threads: int | None = None,
    profile: str | None = None,
    **options: Any,
) -> Predictor:
    """Open a bundle on an engine.

    Args:
        path_or_name: a bundle directory, or the name of a bundle that ships with the package.
        engine: `onnxruntime`, `torch` or `tensorrt`.
        device: `cpu`, `cuda` or `cuda:<index>`.
        threads: CPU threads; the engine's default if None.
        profile: `default`, or `fast`: sampling that costs less and was measured to lose nothing
            (of the packaged models: under actions), which is taken if the bundle has it.
        options: the engine's own, as docs/engines.md lists them.

    Raises:
        BundleError: missing, cut, tampered with, or of another schema version.
        ConfigError: if the bundle has no such profile.
        EngineError: no such engine or device here; nothing falls back to another.
    """
    bundle = Bundle.open(path_or_name)
    sampling = bundle.manifest.profile(profile)
    return Predictor(create(engine, bundle, device=device, threads=threads, **options), sampling)


class Predictor:
    """A model on an engine. Immutable; any number of threads may start rollouts from it."""

    def __init__(self, engine: Engine, sampling: SamplingConfig | None = None) -> None:
        """`sampling` replaces the bundle's defaults."""
        self.engine = engine
        self.bundle = engine.bundle
        self.config = engine.bundle.manifest.model
        self.sampling = engine.bundle.manifest.sampling if sampling is None else sampling

    def __reduce__(self) -> NoReturn:
        """Raises `StateError`: no file holds the engine."""
        raise StateError(
            "a predictor is neither copied nor pickled; threads share it, and another process "
            "calls load() itself"
        )

    def start(
        self,
        context: UInt8 | None = None,
        *,
        seed: int = 0,
        batch: int | None = None,
        stream: int = 0,
        actions: npt.ArrayLike | None = None,
        sampling: SamplingConfig | None = None,
        clock: int = 0,
    ) -> Rollout:
        """Begin a rollout.

        Args:
            context: uint8 RGB (1+n*t, H, W, 3), or (B, 1+n*t, H, W, 3); None starts from nothing.
            seed, stream: row b of the batch draws its noise from (seed, stream + b).
            batch: videos predicted at once; a single context is shared by all of them. By default
                as many as the context holds.
            actions: numbers (B, n, A) or (n, A), taken as float32: the actions between the
                context's latent frames.
            sampling: replaces the predictor's.
            clock: number of the first latent frame. Only differences of times enter the model, so
                it may be chosen for `Rollout.seat`.

        Raises:
            InputError: wrong shape, dtype or frame count.
            ConfigError: sampling options the model cannot run.
        """
        if batch is None:
            array = None if context is None else as_array("context", context, FRAMES)
            batch = len(array) if array is not None and array.ndim == 5 else 1
        self.bundle.manifest.batch.require(batch)
        (first,) = _keys("stream", stream)
        batch = int(batch)
        if first + batch > 2**64:
            raise ConfigError(f"stream: {batch} videos from {first} on go past the last, 2**64 - 1")
        chosen = self.sampling if sampling is None else sampling
        if not isinstance(chosen, SamplingConfig):
            raise ConfigError(f"sampling must be a SamplingConfig, got {chosen!r}")
        self.bundle.manifest.require_flow(chosen)
        streams = tuple(range(first, first + batch))
        rollout = Rollout(self, streams, seed, chosen, clock=clock)
        rollout._begin(context, actions)
        return rollout


def _exclusive(
    method: Callable[Concatenate[Rollout, P], R],
) -> Callable[Concatenate[Rollout, P], R]:
    """A method of a rollout that raises `StateError` while another one runs."""

    @functools.wraps(method)
    def alone(self: Rollout, /, *args: P.args, **kwargs: P.kwargs) -> R:
        # a list, because a signal between a lock's acquire() and the body would leave it held
        me = object()
        try:
            self._calls.append(me)
            if self._calls[0] is not me:
                raise StateError(
                    f"{method.__name__}: the rollout is in the middle of another call, from "
                    "another thread or around `on_canvas`; one call at a time, or work on a fork"
                )
            return method(self, *args, **kwargs)
        finally:
            if me in self._calls:
                self._calls.remove(me)

    return alone


class Rollout:
    """A batch of videos being predicted. Made by `Predictor.start`; not for use by two threads."""

    def __init__(
        self,
        predictor: Predictor,
        streams: tuple[int, ...],
        seed: int,
        sampling: SamplingConfig,
        *,
        clock: int = 0,
    ) -> None:
        self.predictor, self.sampling = predictor, sampling
        self.config = predictor.config
        self._calls: list[object] = []
        self._unobserved = 0
        self._encoder_current = False
        self._interrupted = False
        self._start_state: RolloutState | None = None
        self._levels: tuple[SamplingConfig | None, ...] = (sampling,)
        self._deadlines: Deadlines | None = None
        self._seed, *rest = _keys("seed and stream", seed, *streams)
        self._streams = tuple(rest)
        if not isinstance(clock, (int, np.integer)) or not 0 <= clock < LATEST:
            raise ConfigError(
                f"clock must be an integer in [0, 2**40), got {clock!r}; to be seated, a context "
                "may have no more latent frames than the batch has come to"
            )
        self._time = int(clock)
        self._program = predictor.engine.program(batch=len(streams), sampling=sampling)
        self._noise = NoiseAhead(self._program.noise)
        self._program.since[:] = self._time

    def __reduce__(self) -> NoReturn:
        """Raises `StateError`: `copy.copy` would share the arrays, and no file holds the engine."""
        raise StateError(
            "a rollout is neither copied nor pickled; fork() makes another one, and state() gives "
            "what restore() takes, also in another process"
        )

    # -- starting

    def _begin(self, context: UInt8 | None, actions: npt.ArrayLike | None) -> None:
        t = self.config.autoencoder.temporal_compression
        if context is not None:
            clip = self._checked_frames("context", context, None)
            frames = clip.shape[1]
            if (frames - 1) % t:
                good = (frames - 1) // t * t + 1
                raise InputError(
                    f"context: the first frame is a latent frame of its own and every later one "
                    f"takes {t}, so 1 + n*{t} frames are needed; got {frames}, give {good} or "
                    f"{good + t}"
                )
            count = (frames - 1) // t
            told = self._checked_actions(actions, count)
            for i in range(1 + count):
                first = i == 0
                self._advance(None if first or told is None else told[:, i - 1])
                self._program.encode(clip[:, :1] if first else clip[:, 1 + (i - 1) * t : 1 + i * t])
                self._program.decode()
            self._encoder_current = True
        elif actions is not None:
            raise InputError("actions: there is no context they could belong to")
        self._start_state = self._own_state()

    def _checked_frames(self, what: str, frames: UInt8, count: int | None) -> UInt8:
        """Frames as (B or 1, T, H, W, 3) uint8.

        Raises:
            InputError: naming what was expected and what came.
        """
        ae, b = self.config.autoencoder, len(self._streams)
        wanted = f"uint8 ({count or 'T'}, {ae.height}, {ae.width}, 3)"
        array = as_array(what, frames, FRAMES)
        if array.dtype != np.uint8:
            raise InputError(f"{what}: expected {wanted}, got dtype {array.dtype}")
        if array.ndim == 4:
            array = array[None]
        good = (
            array.ndim == 5
            and array.shape[2:] == (ae.height, ae.width, 3)
            and array.shape[0] in (1, b)
            and array.shape[1] >= 1
            and (count is None or array.shape[1] == count)
        )
        if not good:
            raise InputError(
                f"{what}: expected {wanted}, with {b} or no videos in front; got shape "
                f"{np.shape(frames)}"
            )
        return array

    def _checked_actions(self, actions: npt.ArrayLike | None, count: int) -> Float32 | None:
        a, b = self.config.action_dim, len(self._streams)
        if actions is None:
            return None
        if not a:
            raise InputError(f"actions: model {self.config.name} takes none")
        if self.config.group > 1:
            raise InputError(
                f"actions: {self.config.name} is told the actions of a group of latent frames by "
                "step(action); leave those of the context out"
            )
        array = finite_numbers("actions", actions)
        if array.ndim == 2:
            array = array[None]
        if array.ndim != 3 or array.shape[0] not in (1, b) or array.shape[1:] != (count, a):
            raise InputError(
                f"actions: expected float32 ({count}, {a}) for this context, with {b} or no videos "
                f"in front; got shape {np.shape(actions)}"
            )
        return array

    # -- one frame

    def _advance(self, action: Float32 | None) -> None:
        """Feed the latest latent frame to the Temporal ViT."""
        self._program.advance(self._time, action)
        self._time += 1

    @_exclusive
    def step(
        self,
        action: npt.ArrayLike | None = None,
        *,
        decode_canvas: bool = False,
        on_canvas: Callable[[UInt8], None] | None = None,
        budget_ms: float | None = None,
    ) -> Prediction:
        """Predict the next latent frame, or the next group of them.

        Args:
            action: numbers (A,) or (B, A), taken as float32: the action between the latest frame
                and this one (the actions of all frames of a group); None if it is not known (the
                model was trained for both).
            decode_canvas: also decode the canvas to pixels (one more decoder run).
            on_canvas: called with them, uint8 (B, t, H, W, 3) of its own, as soon as they are
                there: before the AR steps. What it takes counts. Not called where there is none.
            budget_ms: milliseconds from the call until the frame is there. The frame is drawn with
                as much sampling as fits nearly always, down to the canvas alone; more time than
                the cheapest takes cannot be saved. Needs `warmup(deadlines=True)`.

        Raises:
            InputError: an action of the wrong shape, or any action for a model without.
            StateError: a budget without its latency table.
            EngineError: the engine returned values that are not finite.
        """
        return self._step(
            action, decode_canvas=decode_canvas, on_canvas=on_canvas, budget_ms=budget_ms
        )

    def _step(
        self,
        action: npt.ArrayLike | None,
        *,
        decode_canvas: bool = False,
        on_canvas: Callable[[UInt8], None] | None = None,
        budget_ms: float | None = None,
        level: int = 0,
        order: Int64 | None = None,
    ) -> Prediction:
        clock = Clock()
        told = self._checked_action(action)
        if on_canvas is not None and not callable(on_canvas):
            raise InputError(f"on_canvas: expected a function of the frames, got {on_canvas!r}")
        if budget_ms is not None:
            self._require_deadlines(budget_ms)
            budget_ms = float(min(budget_ms, 1e9))  # an integer may be more than a float holds
        self._enter()
        frame = self._time
        from_nothing = not self._begun
        canvas_frames: UInt8 | None = None
        chosen, chosen_at = level, 0.0

        def keep(frames: UInt8) -> None:
            nonlocal canvas_frames
            canvas_frames = frames.copy()
            if on_canvas is not None:
                on_canvas(frames.copy())

        def choose() -> Level:
            nonlocal chosen, chosen_at
            chosen_at = clock.elapsed
            if budget_ms is not None:
                assert self._deadlines is not None
                chosen = self._deadlines.choose(
                    budget_ms / 1e3 - chosen_at, looked="canvas_decoder" in clock.timings
                )
            if self._levels[chosen] is None and from_nothing:
                chosen -= 1  # there is no canvas yet
            return None if self._levels[chosen] is None else chosen

        key = NoiseKey(
            sampling=self.sampling,
            seed=self._seed,
            streams=self._streams,
            since=self._since,
            frame=frame,
            has_canvas=self.config.canvas and not from_nothing,
        )
        self._noise.fill(key)
        clock.lap("noise")
        drawn = self._program.predict(
            frame,
            told,
            order=order,
            level=choose,
            on_canvas=keep if decode_canvas or on_canvas is not None else None,
            meanwhile=lambda: self._noise.draw(
                dataclasses.replace(
                    key, frame=frame + self.config.group, has_canvas=self.config.canvas
                )
            ),
            clock=clock,
        )
        self._time += self.config.group
        self._unobserved += self.config.group
        self._interrupted = False
        ae = self.config.autoencoder
        # the first frame of a video made from nothing stands for one pixel frame
        first = slice(ae.temporal_compression - 1 if from_nothing else 0, None)

        def own(values: Array | None) -> Any:
            return None if values is None else values.copy()

        staticness = own(drawn.staticness)
        if staticness is not None:
            grid = ae.latent_height, ae.latent_width
            staticness = staticness.reshape(*staticness.shape[:-1], *grid)
        sampling = self._levels[chosen]
        prediction = Prediction(
            frames=drawn.frames[:, first].copy(),
            latent=drawn.latent.copy(),
            canvas=own(drawn.canvas),
            canvas_frames=canvas_frames,
            staticness=staticness,
            order=drawn.order.copy(),
            frame=frame,
            ar_steps=sampling.ar_steps if sampling else 0,
            flow_steps=sampling.flow_steps if sampling else 0,
            guided=sampling is not None
            and sampling.guided(has_canvas=self.config.canvas and not from_nothing),
            deadline_met=None,
            timings=clock.timings,
        )
        clock.lap("output")
        clock.finish()
        taken = clock.elapsed
        # an early look is the caller's time: a slow one makes no slow machine
        look = sum(clock.timings.get(label, 0.0) for label in ("canvas_decoder", "on_canvas"))
        self._timed = Timed(chosen_at - look, taken - chosen_at)
        if budget_ms is None:
            return prediction
        assert self._deadlines is not None
        self._deadlines.record(chosen, self._timed)
        return dataclasses.replace(prediction, deadline_met=bool(1e3 * taken <= budget_ms))

    def _require_deadlines(self, budget_ms: float) -> None:
        if self._deadlines is None:
            raise StateError(
                "step: a budget needs to know what frames take on this machine; call "
                "warmup(deadlines=True) once before the loop"
            )
        real = isinstance(budget_ms, (int, float, np.integer, np.floating))
        if not real or not budget_ms > 0:
            raise InputError(f"budget_ms: expected milliseconds > 0, got {budget_ms!r}")

    @property
    def _begun(self) -> bool:
        """Whether there is a latent frame to go on from."""
        return bool(self._time > self._program.since.max())

    def _enter(self) -> None:
        """Mark the rollout as changing; the mark goes when the change is complete."""
        self._require_whole()
        self._interrupted = True

    def _require_whole(self) -> None:
        """Raise `StateError` if an earlier change did not complete."""
        if self._interrupted:
            raise StateError(
                "an earlier step, observation or restore failed or was interrupted, so the state "
                "holds half of it; go back with restore(state) or reset()"
            )

    def _checked_action(self, action: npt.ArrayLike | None) -> Float32 | None:
        if action is None:
            return None
        a, b = self.config.action_dim, len(self._streams)
        if not a:
            raise InputError(f"action: model {self.config.name} takes none; pass None")
        array = finite_numbers("action", action)
        if array.shape not in ((a,), (b, a)):
            raise InputError(f"action: expected shape ({a},) or ({b}, {a}), got {array.shape}")
        return array

    # -- what really happened

    @_exclusive
    def observe(self, frames: UInt8, action: npt.ArrayLike | None = None) -> Float32:
        """Tell the rollout what really happened.

        After a `step`, the real frames take the place of that prediction (its action stands);
        otherwise they extend the history, `action` being what led to them.

        Args:
            frames: uint8 (t, H, W, 3) or (B, t, H, W, 3).

        Returns:
            Their latents, float32 (B, N, C).

        Raises:
            InputError: wrong shape or dtype, or an action where the step already had one.
            StateError: if more than one latent frame was predicted since the last real one: their
                histories hold imagined frames. Imagine on `fork()` and observe on the parent.
        """
        group = self._checked_frames("frames", frames, self.config.autoencoder.temporal_compression)
        if not self._encoder_current:
            raise StateError(
                "observe: the encoder has not seen this video's latest frames (it started from "
                "nothing, or latents were observed); start a new rollout from real frames"
            )
        again = self._before_observation(action)
        self._program.encode(group)
        self._after_observation(again=again)
        return self._program.latent()

    @_exclusive
    def observe_latent(self, latent: Float32, action: npt.ArrayLike | None = None) -> None:
        """Like `observe`, for normalised latents (B, N, C) float32 of your own."""
        array = as_array("latent", latent, "an array of float32")
        c = self.config
        shape = (len(self._streams), c.tokens, c.autoencoder.latent_channels)
        if array.dtype != np.float32 or array.shape != shape:
            raise InputError(f"latent: expected float32 {shape}, got {array.dtype} {array.shape}")
        array = finite_numbers("latent", array)
        again = self._before_observation(action)
        self._program.set_latent(array)
        self._encoder_current = False
        self._after_observation(again=again)

    def _before_observation(self, action: npt.ArrayLike | None) -> bool:
        """Whether the observation replaces a prediction, which was decoded already."""
        self._require_whole()
        if self._unobserved > 1:
            raise StateError(
                f"observe: {self._unobserved} latent frames were predicted since a real one, or a "
                "video was seated between a step and its observation; imagine on fork() and "
                "observe on the parent, or start a new rollout"
            )
        if self._unobserved and action is not None:
            raise InputError(
                "observe: the action of the step being replaced was told with that step, or not at "
                "all; leave it out here"
            )
        if self.config.group > 1 and action is not None:
            raise InputError(
                f"observe: {self.config.name} is told the actions of a group of latent frames by "
                "step(action); leave that of a single frame out"
            )
        told = self._checked_action(action)
        self._enter()
        if self._unobserved:
            return True
        self._advance(told)
        return False

    def _after_observation(self, *, again: bool) -> None:
        self._program.decode(again=again)
        self._unobserved = 0
        self._interrupted = False

    # -- copies

    @_exclusive
    def state(self) -> RolloutState:
        """A copy of the rollout's state: a snapshot for `restore`.

        Raises:
            StateError: if an earlier step or observation did not complete.
        """
        return self._own_state()

    def _own_state(self) -> RolloutState:
        return self._state(self._program.snapshot(), self._streams, self._since)

    @property
    def _since(self) -> tuple[int, ...]:
        return tuple(int(s) for s in self._program.since)

    def _state(
        self, arrays: Mapping[str, Array], streams: tuple[int, ...], since: tuple[int, ...]
    ) -> RolloutState:
        self._require_whole()
        return RolloutState(
            arrays=arrays,
            bundle=self.predictor.bundle.fingerprint,
            seed=self._seed,
            streams=streams,
            since=since,
            time=self._time,
            unobserved=self._unobserved,
            encoder_current=self._encoder_current,
        )

    @_exclusive
    def restore(self, state: RolloutState) -> None:
        """Go back (or over) to a state of this model and batch size; nothing is recomputed.

        Raises:
            InputError: if it is no `RolloutState`.
            StateError: if the state is of another bundle or batch size, or its numbers are none of
                a rollout's.
            ConfigError: if its seed or streams are no 64-bit keys.
        """
        self._restore("restore", state)

    def _restore(self, what: str, state: RolloutState) -> None:
        self._require_state(what, state, len(self._streams))
        self._interrupted = True
        self._program.load(state.arrays)
        self._program.since[:] = state.since
        self._seed, self._streams = int(state.seed), tuple(int(s) for s in state.streams)
        self._time, self._unobserved = int(state.time), int(state.unobserved)
        self._encoder_current = bool(state.encoder_current)
        self._interrupted = False

    def _require_state(self, what: str, state: RolloutState, batch: int) -> None:
        """Raise `StateError` unless `state` is of this bundle and of `batch` videos."""
        if not isinstance(state, RolloutState):
            raise InputError(f"{what}: expected a state from state(), got {type(state).__name__}")
        if state.bundle != self.predictor.bundle.fingerprint:
            raise StateError(f"{what}: this state is of another bundle; use one of this model's")
        if len(state.streams) != batch:
            raise StateError(
                f"{what}: this state is of another batch size, {len(state.streams)} videos, not of "
                f"{batch}"
            )
        hidden = self.predictor.bundle.manifest.dtype
        wanted = {
            k: (shape, STORAGE[hidden if dtype == "hidden" else dtype])
            for k, (shape, dtype) in state_shapes(self.config, batch).items()
        }
        if wanted != {
            k: (getattr(v, "shape", None), getattr(v, "dtype", None))
            for k, v in state.arrays.items()
        }:
            raise StateError(f"{what}: these are not the arrays of a state; take it by state()")
        numbers = (state.seed, state.time, state.unobserved, *state.streams, *state.since)
        # what np.load gives of an .npz is an array for each of them, and would change with the step
        if len(state.since) != batch or not all(isinstance(n, (int, np.integer)) for n in numbers):
            raise StateError(
                f"{what}: seed, time and unobserved are integers, streams and since of {batch}; "
                f"got {state.seed!r}, {state.time!r}, {state.unobserved!r}, {state.streams!r} and "
                f"{state.since!r}; after loading a file say int(...) or .tolist()"
            )
        _keys(f"{what}: seed and streams", state.seed, *state.streams)
        if state.unobserved < 0 or not all(0 <= s <= state.time < 2**63 for s in state.since):
            raise StateError(
                f"{what}: a video cannot begin with frame {max(state.since)} and be at frame "
                f"{state.time} with {state.unobserved} unobserved; take the state by state()"
            )

    @_exclusive
    def seat(self, row: int, state: RolloutState) -> None:
        """Put another video in the place of video `row`; the others go on undisturbed. So a batch
        of fixed size serves videos that come and go.

        Args:
            state: of a rollout of one video at the same `frame` (`Predictor.start(clock=...)`) and
                with the same seed. From now on `row` draws its noise from that video's stream.

        Raises:
            InputError: if there is no such row.
            StateError: if the state is of another bundle, batch size, seed or frame, or either has
                no latent frame yet.
        """
        if isinstance(row, bool) or not isinstance(row, (int, np.integer)):
            raise InputError(f"seat: expected the number of a row, got {row!r}")
        if not 0 <= row < len(self._streams):
            raise InputError(f"seat: row {row} of a batch of {len(self._streams)}")
        self._require_whole()
        self._require_state("seat", state, 1)
        if (state.time, state.seed) != (self._time, self._seed):
            raise StateError(
                f"seat: this state is at frame {state.time} with seed {state.seed}, the rollout at "
                f"frame {self._time} with seed {self._seed}; both must agree"
            )
        if not self._begun or state.time <= state.since[0]:
            raise StateError("seat: both videos need at least one latent frame; start from context")
        self._interrupted = True
        self._program.load(state.arrays, int(row))
        self._program.since[row] = state.since[0]
        self._streams = (*self._streams[:row], state.streams[0], *self._streams[row + 1 :])
        if self._unobserved != state.unobserved:  # an observation would replace it in some rows
            self._unobserved = max(self._unobserved, state.unobserved, 2)
        self._encoder_current = self._encoder_current and state.encoder_current
        self._interrupted = False

    @_exclusive
    def reset(self, seed: int | None = None) -> None:
        """Go back to where this rollout began (after `start`'s context, or at the `fork`), with
        another seed if one is given."""
        state = self._start_state
        assert state is not None
        if seed is not None:
            state = dataclasses.replace(state, seed=_keys("seed", seed)[0])
        self._restore("reset", state)

    @_exclusive
    def fork(
        self, n: int = 1, *, streams: Sequence[int] | None = None, into: Rollout | None = None
    ) -> Rollout:
        """n futures of each video, as one rollout of batch B*n that shares nothing with this one.

        Row b*n + j continues video b; unless `streams` says otherwise it draws its noise from
        stream `own stream + j*S`, S being B, or where rows were seated as many as lie from the
        lowest own stream to the highest. The first copy of each replays what this rollout will do.

        Args:
            into: an earlier fork of the same size to use again, so that a loop which forks at every
                tick makes and binds no new rollout. Its latency table stays; a new fork has none.

        Raises:
            InputError: if B*n is more than the bundle was exported for.
            ConfigError: streams that are no 64-bit keys, or own ones so high that there are none.
            StateError: if `into` is of another bundle or batch size, or this rollout holds half a
                frame.
        """
        b = len(self._streams)
        limit = self.predictor.bundle.manifest.batch.maximum
        if not isinstance(n, (int, np.integer)) or n < 1 or b * n > limit:
            raise InputError(f"fork: {n} futures of {b} videos; 1..{limit // b} are possible")
        n = int(n)
        span = max(self._streams) - min(self._streams) + 1
        own = tuple(s + j * span for s in self._streams for j in range(n))
        if streams is not None and not _is_row(streams, b * n):
            raise InputError(f"fork: expected {b * n} streams, got {streams!r}")
        if streams is None and max(own) >= 2**64:
            raise ConfigError(
                f"fork: the copies would draw from streams up to {max(own)}, the last is 2**64 - 1;"
                " choose them by `streams`"
            )
        chosen = _keys("fork: streams", *(own if streams is None else streams))
        if into is not None and not isinstance(into, Rollout):
            raise InputError(f"fork: `into` is an earlier fork, got {type(into).__name__}")
        if into is self:
            raise StateError("fork: `into` is an earlier fork, not the rollout itself")
        if into is not None and into._calls:
            raise StateError(
                "fork: `into` is in the middle of a call; wait for it, or take another"
            )
        copied = {
            k: np.repeat(v, n, axis=1 if k.startswith("cache_") else 0)
            for k, v in self._program.snapshot().items()
        }
        since = tuple(s for s in self._since for _ in range(n))
        state = self._state(copied, chosen, since)
        other = into or Rollout(self.predictor, chosen, self._seed, self.sampling)
        if into is not None and into.sampling != self.sampling:
            raise StateError("fork: `into` was started with other sampling options")
        other._take(state)
        return other

    @_exclusive
    def _take(self, state: RolloutState) -> None:
        """Become what a fork is to be, and where `reset` goes back to."""
        self._restore("fork: `into`", state)
        self._start_state = state

    @_exclusive
    def warmup(self, *, deadlines: bool = False) -> None:
        """Do now what the first frames would otherwise wait for: kernels are compiled and CUDA
        graphs captured. The rollout's state stays as it is.

        Args:
            deadlines: also measure what frames take with ever fewer steps (`latency`), for steps
                with a budget. Takes as long as 200 frames or more.

        Raises:
            StateError: if an earlier step or observation did not complete, or there is no latent
                frame to measure from.
        """
        self._require_whole()
        if not deadlines:
            self._warm_program()
            return
        if not self._begun:
            raise StateError(
                "warmup: with deadlines there must be a latent frame to go on from; start from "
                "context or call step() first"
            )
        if len(self._levels) == 1:
            unrolled = self.predictor.bundle.manifest.unrolled
            rungs = ladder(self.sampling, unrolled=unrolled, has_canvas=self.config.canvas)
            for rung in rungs[self._program.levels :]:  # all but the first, or what was left
                self._program.add_level(rung)
            self._levels = (*rungs, None) if self.config.canvas else rungs
        self._warm_program()
        kept = self._own_state()
        times = []
        try:
            for level in range(len(self._levels)):
                measured = []
                for _ in range(MEASURED_FRAMES):
                    self._step(None, level=level)
                    measured.append(self._timed)
                times.append(measured[MEASURED_FRAMES // 4 :])  # the first ones warm the caches
                self._restore("warmup", kept)
            looked = []  # of which only what comes before the choice counts: the cheapest will do
            for _ in range(MEASURED_FRAMES if self.config.canvas else 0):
                self._step(None, level=len(self._levels) - 1, decode_canvas=True)
                looked.append(self._timed)
            self._restore("warmup", kept)
        except BaseException:
            self._interrupted = True  # it may be some frames on
            raise
        self._deadlines = Deadlines(
            self._levels,
            times,
            looked=looked[MEASURED_FRAMES // 4 :],
            has_canvas=self.config.canvas,
        )

    def _warm_program(self) -> None:
        self._enter()
        self._program.warmup()
        self._interrupted = False

    @property
    def latency(self) -> tuple[Rung, ...]:
        """What a frame takes with ever fewer steps, best first; measured by `warmup`."""
        return self._deadlines.table if self._deadlines else ()

    @property
    def seed(self) -> int:
        return self._seed

    @property
    def batch(self) -> int:
        """Videos predicted at once."""
        return len(self._streams)

    @property
    def frame(self) -> int:
        """Latent frames seen or predicted so far."""
        return self._time


def _keys(what: str, *values: int) -> tuple[int, ...]:
    """The values as Python's integers. Raises `ConfigError` unless they are whole numbers that fit
    a 64-bit key."""
    for value in values:
        if not isinstance(value, (int, np.integer)) or not 0 <= value < 2**64:
            raise ConfigError(f"{what} must be integers in [0, 2**64), got {value!r}")
    return tuple(int(value) for value in values)


def _is_row(values: Any, count: int) -> bool:
    try:
        return bool(np.shape(values) == (count,))
    except ValueError:  # rows of several lengths
        return False


def as_array(what: str, values: Any, wanted: str) -> Array:
    """The values as an array; `InputError` that says what is `wanted` where NumPy takes none."""
    try:
        return np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:  # the others of PyTorch's tensors
        raise InputError(f"{what}: expected {wanted} ({error})") from None


def finite_numbers(what: str, values: Any) -> Float32:
    """Finite float32 values."""
    try:
        array = np.asarray(values)
        if array.dtype.kind not in "fiub":
            raise TypeError(f"got {array.dtype.name}")
        with np.errstate(over="ignore"):  # what becomes infinite is refused below
            array = array.astype(np.float32, copy=False)
    except (TypeError, ValueError, RuntimeError) as error:  # the last of tensors with gradients
        raise InputError(f"{what}: expected numbers ({error})") from None
    if not np.isfinite(array).all():
        raise InputError(f"{what}: contains values that are not finite")
    return array
