"""Predictor and Rollout: the few-step autoregressive loop over a bundle's components.

A `Rollout` owns every buffer it will ever need and has bound them to the engine's components when
it starts; a step fills noise buffers, runs the bound components in order and copies the frames out.
Letters as in `canvasmar_rt.config`; t is pixel frames per latent frame.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from canvasmar_rt.bundle import Bundle
from canvasmar_rt.components import MASKED, autoencoder_states, components
from canvasmar_rt.config import SamplingConfig
from canvasmar_rt.engines import Engine, Run, create
from canvasmar_rt.errors import ConfigError, EngineError, InputError, StateError
from canvasmar_rt.noise import Purpose, fill_gumbel, fill_normal
from canvasmar_rt.schedule import (
    flow_plan,
    generation_order,
    guidance_branches,
    set_sizes,
    time_rotation,
)

Array = npt.NDArray[Any]
UInt8 = npt.NDArray[np.uint8]
Float32 = npt.NDArray[np.float32]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prediction:
    """One predicted latent frame; all arrays are the caller's own.

    frames: uint8 RGB (B, t, H, W, 3), the t pixel frames it decodes to ((B, 1, H, W, 3) for the
        first frame of a video made from nothing, which stands for one pixel frame).
    latent: float32 (B, N, C), normalised latents in raster order.
    canvas: float32 (B, N, C), the blurred guess of the latent frame (eq. 5); None without a canvas.
    canvas_frames: uint8 like `frames`, the canvas decoded; None unless asked for.
    staticness: float32 (B, h, w) in 0..1, larger is stiller (eq. 7); None without a canvas.
    order: int64 (B, N), token positions in the order they were drawn.
    frame: index of this latent frame in the video, context included.
    timings: seconds spent in each component, in `noise` and in `total`.
    """

    frames: UInt8
    latent: Float32
    canvas: Float32 | None
    canvas_frames: UInt8 | None
    staticness: Float32 | None
    order: npt.NDArray[np.int64]
    frame: int
    timings: Mapping[str, float]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutState:
    """A copy of everything a rollout carries from frame to frame; arrays by name, and scalars.
    `bundle` is the fingerprint of the bundle it belongs to."""

    arrays: Mapping[str, Array]
    bundle: str
    seed: int
    streams: tuple[int, ...]
    time: int
    unobserved: int
    encoder_current: bool


def load(
    path_or_name: str | Path,
    *,
    engine: str = "onnxruntime",
    device: str = "cpu",
    threads: int | None = None,
) -> Predictor:
    """Open a bundle on an engine.

    Args:
        path_or_name: a bundle directory, or the name of a bundle that ships with the package.
        engine: `onnxruntime` or `torch` (the eager reference).
        device: `cpu`.
        threads: CPU threads; the engine's default if None.

    Raises:
        BundleError: missing, cut, tampered with, or of another schema version.
        EngineError: no such engine or device here; nothing falls back to another.
    """
    bundle = Bundle.open(path_or_name)
    return Predictor(create(engine, bundle, device=device, threads=threads))


class Predictor:
    """A model on an engine. Immutable; any number of threads may start rollouts from it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.bundle = engine.bundle
        self.config = engine.bundle.manifest.model
        self.sampling = engine.bundle.manifest.sampling

    def start(
        self,
        context: UInt8 | None = None,
        *,
        seed: int = 0,
        batch: int | None = None,
        stream: int = 0,
        actions: Float32 | None = None,
        sampling: SamplingConfig | None = None,
    ) -> Rollout:
        """Begin a rollout.

        Args:
            context: uint8 RGB (1+n*t, H, W, 3), or (B, 1+n*t, H, W, 3); None starts from nothing.
            seed, stream: row b of the batch draws its noise from (seed, stream + b).
            batch: videos predicted at once; a single context is shared by all of them. By default
                as many as the context holds.
            actions: float32 (B, n, A) or (n, A), the actions between the context's latent frames.
            sampling: overrides the bundle's defaults.

        Raises:
            InputError: wrong shape, dtype or frame count.
            ConfigError: sampling options the model cannot run.
        """
        if batch is None:
            batch = len(context) if context is not None and np.ndim(context) == 5 else 1
        self.bundle.manifest.batch.require(batch)
        streams = tuple(range(stream, stream + batch))
        rollout = Rollout(self, streams, seed, sampling or self.sampling)
        rollout._begin(context, actions)
        return rollout


class Rollout:
    """A batch of videos being predicted. Made by `Predictor.start`; not for use by two threads."""

    def __init__(
        self, predictor: Predictor, streams: tuple[int, ...], seed: int, sampling: SamplingConfig
    ) -> None:
        self.predictor, self.sampling = predictor, sampling
        self.config = config = predictor.config
        self._sizes = set_sizes(config.tokens, sampling.ar_steps)
        self._streams, self._seed = streams, seed
        self._time = 0
        self._unobserved = 0
        self._encoder_current = False
        self._interrupted = False
        self._start_state: RolloutState | None = None
        _check_key(seed, streams)
        self._allocate()
        self._bind()

    # -- buffers and bindings

    def _allocate(self) -> None:
        c, ae, b = self.config, self.config.autoencoder, len(self._streams)
        n, hidden = c.tokens, self.predictor.bundle.hidden_dtype
        ring = (c.context_frames, b, c.temporal_tokens, c.dim)
        self._latent = np.zeros((b, n, ae.latent_channels), np.float32)
        self._caches = {
            f"{kind}_{i}": np.zeros(ring, hidden)
            for i in range(c.temporal_layers)
            for kind in ("key", "value")
        }
        self._encoder = self._histories(decoder=False)
        self._decoder = self._histories(decoder=True)
        self._group = np.zeros((b, ae.temporal_compression, ae.height, ae.width, 3), np.uint8)
        self._frames = np.zeros_like(self._group)
        self._canvas_frames = np.zeros_like(self._group)
        self._canvas_history = [np.zeros_like(x) for x in self._decoder[0]]
        self._inputs: dict[str, Array] = {
            "latent": self._latent,
            "is_first": np.zeros(b, np.float32),
            "time": np.zeros((2, c.time_rotary_pairs), np.float32),
            "cache_bias": np.full((b, c.context_frames), MASKED, np.float32),
            "z_temporal": np.zeros((b, c.temporal_tokens, c.dim), hidden),
            "z_canvas": np.zeros((b, n, c.dim), hidden),
            "frame_noise": np.zeros_like(self._latent),
            "frame_noise_level": np.array(self.sampling.frame_noise, np.float32),
            "canvas_noise": np.zeros((b, n, c.dim), np.float32),
            "canvas_noise_level": np.array(self.sampling.canvas_noise, np.float32),
            "canvas": np.zeros_like(self._latent),
            "staticness": np.zeros((b, n), np.float32),
            "flow_noise": np.zeros_like(self._latent),
        }
        if c.action_dim:
            self._inputs["action"] = np.zeros((b, c.action_dim), np.float32)
            self._inputs["action_given"] = np.zeros(b, np.float32)
        plan = flow_plan(self.sampling)
        self._inputs |= {
            "flow_time": plan.time,
            "step_new": plan.step_new,
            "step_old": plan.step_old,
        }
        self._gumbel = np.zeros((b, len(self._sizes), n), np.float32)
        self._order = np.zeros((b, n), np.int64)

    def _histories(self, *, decoder: bool) -> tuple[list[Array], list[Array]]:
        """Two sets of causal-convolution histories: one is read while the other is written."""
        shapes = autoencoder_states(self.config.autoencoder, decoder=decoder)
        dtype, b = self.predictor.bundle.hidden_dtype, len(self._streams)
        return (
            [np.zeros((b, *s), dtype) for s in shapes],
            [np.zeros((b, *s), dtype) for s in shapes],
        )

    def _bound(self, component: str, **arrays: Array) -> Run:
        """Bind a component to the rollout's buffers, `arrays` taking precedence by name."""
        table = components(self.config)[component]
        have = {**self._inputs, **arrays}
        return self.predictor.engine.bind(
            component,
            {s.name: have[s.name] for s in table.inputs},
            {s.name: have[s.name] for s in table.outputs},
        )

    def _bind(self) -> None:
        caches = {f"cache_{name}": ring for name, ring in self._caches.items()}
        # one binding per ring slot: the new keys and values are written in place. The slot being
        # written is masked in that run, so reading it there has no effect.
        self._temporal = [
            self._bound(
                "temporal", **caches, **{f"new_{n}": r[slot] for n, r in self._caches.items()}
            )
            for slot in range(self.config.context_frames)
        ]
        self._encode = [self._autoencoder("encoder", self._encoder, i, self._group) for i in (0, 1)]
        self._decode = [
            self._autoencoder("decoder", self._decoder, i, self._frames) for i in (0, 1)
        ]
        self._encoder_side = self._decoder_side = 0  # which set of histories is read next
        self._decode_canvas: list[Run] | None = None
        self._canvas = self._bound("canvas") if self.config.canvas else None
        self._steps = self._bind_steps(has_canvas=self.config.canvas)
        self._first_steps: _Steps | None = None

    def _autoencoder(
        self, component: str, sides: tuple[list[Array], list[Array]], side: int, frames: Array
    ) -> Run:
        arrays = {f"state_{i}": x for i, x in enumerate(sides[side])}
        arrays |= {f"next_state_{i}": x for i, x in enumerate(sides[1 - side])}
        return self._bound(component, frames=frames, **arrays)

    def _bind_steps(self, *, has_canvas: bool) -> _Steps:
        c, b = self.config, len(self._streams)
        branches = guidance_branches(self.sampling, has_canvas=has_canvas)
        g = len(branches.weight)
        arrays: dict[str, Array] = {
            "temporal_on": branches.temporal_on.copy(),
            "canvas_on": branches.canvas_on.copy(),
            "branch_weight": branches.weight.copy(),
        }
        hidden = self.predictor.bundle.hidden_dtype
        condition = None
        if c.condition_attention == "isolated":
            for spec in components(c)["condition"].outputs:
                arrays[spec.name] = np.zeros((g, b, c.temporal_tokens, c.dim), hidden)
            condition = self._bound("condition", **arrays)
        partials = [np.zeros_like(self._latent) for _ in range(min(len(self._sizes), 3))]
        runs, indices, known = [], [], 0
        for k, size in enumerate(self._sizes):
            index = {
                "select_index": np.zeros((b, size), np.int64),
                "mask_index": np.zeros((b, c.tokens - known), np.int64),
            }
            if known:
                index["known_index"] = np.zeros((b, known), np.int64)
            # partials[0] stays empty; the last step writes the latent frame itself
            source = partials[0] if k == 0 else partials[1 + (k - 1) % 2]
            last = k + 1 == len(self._sizes)
            target = self._latent if last else partials[1 + k % 2]
            step = {
                **arrays,
                **index,
                "z_tokens": np.zeros((g, b, size, c.dim), hidden),
                "partial": source,
                "next_partial": target,
            }
            runs.append(
                (
                    self._bound("spatial" if known else "spatial_first", **step),
                    self._bound("flow", **step),
                )
            )
            indices.append(index)
            known += size
        return _Steps(condition, runs, indices)

    # -- starting

    def _begin(self, context: UInt8 | None, actions: Float32 | None) -> None:
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
                self._group[:] = clip[:, :1] if first else clip[:, 1 + (i - 1) * t : 1 + i * t]
                self._advance(None if first or told is None else told[:, i - 1])
                self._run_encoder()
                self._run_decoder()
            self._encoder_current = True
        elif actions is not None:
            raise InputError("actions: there is no context they could belong to")
        self._start_state = self.state()

    def _checked_frames(self, what: str, frames: UInt8, count: int | None) -> UInt8:
        """Frames as (B or 1, T, H, W, 3) uint8.

        Raises:
            InputError: naming what was expected and what came.
        """
        ae, b = self.config.autoencoder, len(self._streams)
        wanted = f"uint8 ({count or 'T'}, {ae.height}, {ae.width}, 3)"
        array = np.asarray(frames)
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

    def _checked_actions(self, actions: Float32 | None, count: int) -> Float32 | None:
        a, b = self.config.action_dim, len(self._streams)
        if actions is None:
            return None
        if not a:
            raise InputError(f"actions: model {self.config.name} takes none")
        array = _numbers("actions", actions)
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
        x, c = self._inputs, self.config
        slot = self._time % c.context_frames
        x["is_first"].fill(float(self._time == 0))
        x["cache_bias"][:, : min(self._time, c.context_frames)] = 0.0
        x["cache_bias"][:, slot] = MASKED
        x["time"][:] = time_rotation(self._time, c.time_rotary_pairs)
        if c.action_dim:
            x["action_given"].fill(float(action is not None))
            x["action"][:] = 0.0 if action is None else action
        self._temporal[slot]()
        self._time += 1

    def _run_encoder(self) -> None:
        self._encode[self._encoder_side]()
        self._encoder_side ^= 1

    def _run_decoder(self) -> None:
        self._decode[self._decoder_side]()
        self._decoder_side ^= 1

    def step(
        self, action: Float32 | Sequence[float] | None = None, *, decode_canvas: bool = False
    ) -> Prediction:
        """Predict the next latent frame.

        Args:
            action: (A,) or (B, A), the action taken between the latest frame and this one; None if
                it is not known (the model was trained for both).
            decode_canvas: also decode the canvas to pixels (one more decoder run).

        Raises:
            InputError: an action of the wrong shape, or any action for a model without.
            EngineError: the engine returned values that are not finite.
        """
        return self._step(action, decode_canvas=decode_canvas)

    def _step(
        self,
        action: Float32 | Sequence[float] | None,
        *,
        decode_canvas: bool = False,
        order: npt.NDArray[np.int64] | None = None,
    ) -> Prediction:
        told = self._checked_action(action)
        self._enter()
        clock = _Clock()
        frame = self._time
        from_nothing = frame == 0
        has_canvas = self._canvas is not None and not from_nothing
        self._draw_noise(frame, has_canvas)
        clock.lap("noise")
        self._advance(told)
        clock.lap("temporal")
        if has_canvas:
            assert self._canvas is not None
            self._canvas()
            clock.lap("canvas")
        staticness = self._inputs["staticness"] if has_canvas else None
        if staticness is not None:
            self._require_finite("canvas", staticness)
        if order is None:
            generation_order(staticness, self._gumbel, self.sampling, self._order)
        else:
            self._order[:] = order
        steps = self._steps
        if from_nothing and self.config.canvas:
            if self._first_steps is None:
                self._first_steps = self._bind_steps(has_canvas=False)
            steps = self._first_steps
        steps.fill(self._order)
        clock.lap("order")
        if steps.condition is not None:
            steps.condition()
            clock.lap("condition")
        for spatial, flow in steps.runs:
            spatial()
            clock.lap("spatial")
            flow()
            clock.lap("flow")
        self._require_finite("flow", self._latent)
        canvas_frames = None
        if decode_canvas and has_canvas:
            canvas_frames = self._decoded_canvas()
            clock.lap("canvas_decoder")
        self._run_decoder()
        clock.lap("decoder")
        self._unobserved += 1
        self._interrupted = False
        ae = self.config.autoencoder
        grid = (-1, ae.latent_height, ae.latent_width)
        first = slice(-1, None) if from_nothing else slice(None)
        prediction = Prediction(
            frames=self._frames[:, first].copy(),
            latent=self._latent.copy(),
            canvas=self._inputs["canvas"].copy() if has_canvas else None,
            canvas_frames=canvas_frames,
            staticness=None if staticness is None else staticness.reshape(grid).copy(),
            order=self._order.copy(),
            frame=frame,
            timings=clock.timings,
        )
        clock.lap("output")
        clock.finish()
        return prediction

    def _enter(self) -> None:
        """Mark the rollout as changing; the mark goes when the change is complete."""
        self._require_whole()
        self._interrupted = True

    def _require_whole(self) -> None:
        """Raise `StateError` if an earlier step or observation did not complete."""
        if self._interrupted:
            raise StateError(
                "an earlier step or observation failed or was interrupted, so the state holds half "
                "a frame; go back with restore(state) or reset()"
            )

    def _require_finite(self, component: str, values: Float32) -> None:
        if not np.isfinite(values).all():
            raise EngineError(
                f"{component}: engine {self.predictor.engine.name} returned values that are not "
                f"finite; run 'canvasmar-rt verify' on this bundle and engine, and go back with "
                "restore(state) or reset()"
            )

    def _checked_action(self, action: Float32 | Sequence[float] | None) -> Float32 | None:
        if action is None:
            return None
        a, b = self.config.action_dim, len(self._streams)
        if not a:
            raise InputError(f"action: model {self.config.name} takes none; pass None")
        array = _numbers("action", action)
        if array.shape not in ((a,), (b, a)):
            raise InputError(f"action: expected shape ({a},) or ({b}, {a}), got {array.shape}")
        return array

    def _draw_noise(self, frame: int, has_canvas: bool) -> None:
        x, key = self._inputs, {"seed": self._seed, "streams": self._streams, "frame": frame}
        fill_normal(x["flow_noise"], purpose=Purpose.FLOW, **key)  # type: ignore[arg-type]
        fill_gumbel(self._gumbel, purpose=Purpose.ORDER, **key)  # type: ignore[arg-type]
        if has_canvas:
            fill_normal(x["frame_noise"], purpose=Purpose.FRAME_AUGMENTATION, **key)  # type: ignore[arg-type]
            fill_normal(x["canvas_noise"], purpose=Purpose.CANVAS_AUGMENTATION, **key)  # type: ignore[arg-type]

    def _decoded_canvas(self) -> UInt8:
        if self._decode_canvas is None:
            spare = {f"next_state_{i}": x for i, x in enumerate(self._canvas_history)}
            self._decode_canvas = [
                self._bound(
                    "decoder",
                    frames=self._canvas_frames,
                    latent=self._inputs["canvas"],
                    **{f"state_{i}": x for i, x in enumerate(side)},
                    **spare,
                )
                for side in self._decoder
            ]
        self._decode_canvas[self._decoder_side]()
        return self._canvas_frames.copy()

    # -- what really happened

    def observe(self, frames: UInt8, action: Float32 | Sequence[float] | None = None) -> Float32:
        """Tell the rollout what really happened.

        After a `step`, the real frames take the place of that prediction (its action stands);
        otherwise they extend the history, `action` being what led to them.

        Args:
            frames: uint8 (t, H, W, 3) or (B, t, H, W, 3).

        Returns:
            Their latents, float32 (B, N, C).

        Raises:
            InputError: wrong shape or dtype, or an action where the step already had one.
            StateError: if more than one step was predicted since the last real frame: their
                histories hold imagined frames. Imagine on `fork()` and observe on the parent.
        """
        group = self._checked_frames("frames", frames, self.config.autoencoder.temporal_compression)
        if not self._encoder_current:
            raise StateError(
                "observe: the encoder has not seen this video's latest frames (it started from "
                "nothing, or latents were observed); start a new rollout from real frames"
            )
        self._before_observation(action)
        self._group[:] = group
        self._run_encoder()
        self._after_observation()
        return self._latent.copy()

    def observe_latent(
        self, latent: Float32, action: Float32 | Sequence[float] | None = None
    ) -> None:
        """Like `observe`, for normalised latents (B, N, C) float32 of your own."""
        array = np.asarray(latent)
        if array.dtype != np.float32 or array.shape != self._latent.shape:
            raise InputError(
                f"latent: expected float32 {self._latent.shape}, got {array.dtype} {array.shape}"
            )
        array = _numbers("latent", array)
        self._before_observation(action)
        self._latent[:] = array
        self._encoder_current = False
        self._after_observation()

    def _before_observation(self, action: Float32 | Sequence[float] | None) -> None:
        if self._unobserved > 1:
            raise StateError(
                f"observe: {self._unobserved} steps were predicted since the last real frame; "
                "imagine on fork() and observe on the parent, or start a new rollout"
            )
        if self._unobserved and action is not None:
            raise InputError("observe: the step being replaced already had its action")
        told = self._checked_action(action)
        self._enter()
        if self._unobserved:
            self._decoder_side ^= 1  # decode again, from the history before the prediction
        else:
            self._advance(told)

    def _after_observation(self) -> None:
        self._run_decoder()
        self._unobserved = 0
        self._interrupted = False

    # -- copies

    def _arrays(self) -> dict[str, Array]:
        """Everything that lasts from frame to frame, by name; the batch axis is 1 in caches."""
        arrays = {"latent": self._latent, "cache_bias": self._inputs["cache_bias"]}
        arrays |= {f"cache_{k}": v for k, v in self._caches.items()}
        for name, sides, side in (
            ("encoder", self._encoder, self._encoder_side),
            ("decoder", self._decoder, self._decoder_side),
        ):
            arrays |= {f"{name}_{i}": x for i, x in enumerate(sides[side])}
            arrays |= {f"{name}_before_{i}": x for i, x in enumerate(sides[1 - side])}
        return arrays

    def state(self) -> RolloutState:
        """A copy of the rollout's state: a snapshot for `restore`.

        Raises:
            StateError: if an earlier step or observation did not complete.
        """
        return self._state({k: v.copy() for k, v in self._arrays().items()}, self._streams)

    def _state(self, arrays: Mapping[str, Array], streams: tuple[int, ...]) -> RolloutState:
        self._require_whole()
        return RolloutState(
            arrays=arrays,
            bundle=self.predictor.bundle.fingerprint,
            seed=self._seed,
            streams=streams,
            time=self._time,
            unobserved=self._unobserved,
            encoder_current=self._encoder_current,
        )

    def restore(self, state: RolloutState) -> None:
        """Go back (or over) to a state of this model and batch size; nothing is recomputed.

        Raises:
            StateError: if the state is of another bundle or batch size.
        """
        if state.bundle != self.predictor.bundle.fingerprint:
            raise StateError("restore: this state is of another bundle")
        mine = self._arrays()
        shapes = {k: v.shape for k, v in mine.items()}
        if shapes != {k: v.shape for k, v in state.arrays.items()}:
            raise StateError("restore: this state is of another batch size")
        for name, array in mine.items():
            array[:] = state.arrays[name]
        self._seed, self._streams = state.seed, state.streams
        self._time, self._unobserved = state.time, state.unobserved
        self._encoder_current = state.encoder_current
        self._interrupted = False

    def reset(self, seed: int | None = None) -> None:
        """Go back to where this rollout began (after `start`'s context, or at the `fork`), with
        another seed if one is given."""
        assert self._start_state is not None
        if seed is not None:
            _check_key(seed, self._streams)
        self.restore(self._start_state)
        if seed is not None:
            self._seed = seed

    def fork(
        self, n: int = 1, *, streams: Sequence[int] | None = None, into: Rollout | None = None
    ) -> Rollout:
        """n futures of each video, as one rollout of batch B*n that shares nothing with this one.

        Row b*n + j continues video b; unless `streams` says otherwise it draws its noise from
        stream `own stream + j*B`, so the first copy of each replays what this rollout will do.

        Args:
            into: an earlier fork of the same size to use again, so that a loop which forks at every
                tick makes and binds no new rollout.

        Raises:
            InputError: if B*n is more than the bundle was exported for.
            StateError: if `into` is of another bundle or batch size, or this rollout holds half a
                frame.
        """
        b = len(self._streams)
        limit = self.predictor.bundle.manifest.batch.maximum
        if n < 1 or b * n > limit:
            raise InputError(f"fork: {n} futures of {b} videos; 1..{limit // b} are possible")
        own = tuple(s + j * b for s in self._streams for j in range(n))
        if streams is not None and len(streams) != b * n:
            raise InputError(f"fork: expected {b * n} streams, got {len(streams)}")
        chosen = own if streams is None else tuple(streams)
        copied = {
            k: np.repeat(v, n, axis=1 if k.startswith(("cache_key", "cache_value")) else 0)
            for k, v in self._arrays().items()
        }
        state = self._state(copied, chosen)
        other = into or Rollout(self.predictor, chosen, self._seed, self.sampling)
        if into is not None and into.sampling != self.sampling:
            raise StateError("fork: `into` was started with other sampling options")
        other.restore(state)
        other._start_state = state
        return other

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


@dataclasses.dataclass(frozen=True)
class _Steps:
    """Bound runs of all AR steps of a frame, and the index buffers they read."""

    condition: Run | None
    runs: list[tuple[Run, Run]]
    indices: list[dict[str, npt.NDArray[np.int64]]]

    def fill(self, order: npt.NDArray[np.int64]) -> None:
        for index in self.indices:
            tokens = order.shape[1]
            known = tokens - index["mask_index"].shape[1]
            index["mask_index"][:] = order[:, known:]
            index["select_index"][:] = order[:, known : known + index["select_index"].shape[1]]
            if known:
                index["known_index"][:] = order[:, :known]


def _check_key(seed: int, streams: Sequence[int]) -> None:
    """Seeds and streams are whole numbers that fit a 64-bit key."""
    for value in (seed, *streams):
        if not isinstance(value, (int, np.integer)) or not 0 <= value < 2**64:
            raise ConfigError(f"seed and stream must be integers in [0, 2**64), got {value!r}")


def _numbers(what: str, values: Any) -> Float32:
    """Finite float32 values."""
    try:
        array = np.asarray(values, np.float32)
    except (TypeError, ValueError) as error:
        raise InputError(f"{what}: expected numbers ({error})") from None
    if not np.isfinite(array).all():
        raise InputError(f"{what}: contains values that are not finite")
    return array


class _Clock:
    """Seconds by label; laps of one label add up."""

    def __init__(self) -> None:
        self.timings: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def lap(self, label: str) -> None:
        now = time.perf_counter()
        self.timings[label] = self.timings.get(label, 0.0) + now - self._last
        self._last = now

    def finish(self) -> None:
        self.timings["total"] = self._last - self._start
