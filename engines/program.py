"""What a rollout asks of an engine: one program per rollout, which owns every array of it.

A program is made for a batch size and sampling options, allocates and binds all it will ever need,
and then only moves numbers. Letters as in `canvasmar_rt.config`; t is pixel frames per latent
frame.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Protocol

import numpy as np
import numpy.typing as npt

from canvasmar_rt.components import MASKED, autoencoder_states, components
from canvasmar_rt.config import ModelConfig, SamplingConfig
from canvasmar_rt.engines.memory import Array, Index
from canvasmar_rt.errors import NotFiniteError
from canvasmar_rt.noise import Purpose, fill_gumbel, fill_normal
from canvasmar_rt.schedule import flow_temperature, time_rotation

UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]
Float32 = npt.NDArray[np.float32]


class Clock:
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

    @property
    def elapsed(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._start


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise:
    """Host arrays a rollout fills before every frame, float32: flow and frame (B, N, C), canvas
    (B, N, D), order (B, K, N); flow, canvas and order (B, J, ...) of a group. Frame and canvas are
    left alone where there is no canvas, and 0 where the sampling takes none of them."""

    flow: Float32
    frame: Float32
    canvas: Float32
    order: Float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoiseKey:
    """All that decides on a frame's noise; `since`: the frame with which each row's video began."""

    sampling: SamplingConfig
    seed: int
    streams: tuple[int, ...]
    since: tuple[int, ...]
    frame: int
    has_canvas: bool

    def draw(self, into: Noise) -> None:
        sampling, streams, frame = self.sampling, self.streams, self.frame
        normals = [(into.flow, Purpose.FLOW, 1.0)]
        if self.has_canvas:
            normals += [
                (into.frame, Purpose.FRAME_AUGMENTATION, sampling.frame_noise),
                (into.canvas, Purpose.CANVAS_AUGMENTATION, sampling.canvas_noise),
            ]
        for out, purpose, level in normals:
            fill_normal(
                out, seed=self.seed, streams=streams, frame=frame, purpose=purpose, level=level
            )
        fill_gumbel(into.order, seed=self.seed, streams=streams, frame=frame, purpose=Purpose.ORDER)
        if sampling.flow_temperature != (1.0, 1.0):
            for noise, since in zip(into.flow, self.since, strict=True):
                noise *= flow_temperature(sampling, frame - since)


class NoiseAhead:
    """A program's noise, that of the next frame drawn while the device is busy with this one. It is
    the same noise: what was drawn ahead for another frame, or of other streams, is not taken."""

    def __init__(self, noise: Noise) -> None:
        self._noise = noise
        self._spare: Noise | None = None
        self._key: NoiseKey | None = None

    def fill(self, key: NoiseKey) -> None:
        """Put a frame's noise into the program's."""
        if self._spare is None or self._key != key:
            key.draw(self._noise)
            return
        for name, values in vars(self._spare).items():
            np.copyto(getattr(self._noise, name), values)

    def draw(self, key: NoiseKey) -> None:
        """Draw a frame's noise beside the program's."""
        if self._spare is None:
            made = {name: np.zeros_like(x) for name, x in vars(self._noise).items()}
            self._spare = Noise(**made)
        self._key = None  # an interrupt leaves half of it
        key.draw(self._spare)
        self._key = key


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """One latent frame as the program holds it: views that the next call overwrites.

    frames: uint8 (B, t, H, W, 3); latent, canvas: float32 (B, N, C); staticness: float32 (B, N);
    order: int64 (B, N), or (B, 0) where the canvas stands alone. Canvas and staticness are None
    without a canvas. Of a group frames are (B, J*t, H, W, 3), the others (B, J, ...)."""

    frames: UInt8
    latent: Float32
    canvas: Float32 | None
    staticness: Float32 | None
    order: Int64


Level = int | None
"""Which of a program's sampling options draws a frame; None leaves the canvas as it is."""


class Program(Protocol):
    """One rollout's arrays on a device and the work of a frame over them. Not for two threads.

    since: int64 (B,), the frame with which each row's video began; the rollout writes it."""

    noise: Noise
    since: Int64

    @property
    def levels(self) -> int:
        """Ways to draw a frame that are bound."""

    def add_level(self, sampling: SamplingConfig) -> None:
        """Bind another way to draw a frame, level 1 and so on; level 0 is what the program was made
        with, and no other may have more AR steps."""

    def advance(self, time: int, action: Float32 | None) -> None:
        """Feed the latest latent frame (the BOS embedding at time 0) to the Temporal ViT, as frame
        `time` of the video, with the action (A,) or (B, A) that follows it."""

    def encode(self, frames: UInt8) -> None:
        """uint8 (B or 1, t or 1, H, W, 3), repeated where 1: their latents become the latest."""

    def decode(self, *, again: bool = False) -> None:
        """Decode the latest latents; `again` starts from the history before the last decoding."""

    def predict(
        self,
        time: int,
        action: Float32 | None,
        *,
        order: Int64 | None,
        level: Callable[[], Level],
        on_canvas: Callable[[UInt8], None] | None,
        meanwhile: Callable[[], None],
        clock: Clock,
    ) -> Drawn:
        """Advance, then draw the next latent frame from `noise` and decode it. Of a group, frames
        but the last are fed to the Temporal ViT, too, as frames `time` + 1 and so on.

        Args:
            order: (N,) or (B, [J,] N), replaces the model's own.
            level: asked as late as this program can still choose.
            on_canvas: is given a view of the decoded canvas (B, t, H, W, 3), where there is one,
                before the AR steps.
            meanwhile: called once a device beside the host has all it needs for the frame; never on
                the CPU, which has no time to spare.

        Raises:
            EngineError: values that are not finite.
        """

    def latent(self) -> Float32:
        """A copy of the latest latents, float32 (B, N, C)."""

    def set_latent(self, values: Float32) -> None:
        """Make (B, N, C) the latest latents."""

    def snapshot(self) -> dict[str, Array]:
        """Copies of everything that lasts from frame to frame, by name (`state_shapes`)."""

    def load(self, arrays: Mapping[str, Array], row: int | None = None) -> None:
        """Put a snapshot back, or one of a single video into `row`."""

    def warmup(self) -> None:
        """Do now what the first frames would otherwise have to wait for; the state stays."""


Shapes = dict[str, tuple[tuple[int, ...], str]]
"""Shape and dtype by name."""


TOLD = ("is_first", "time", "cache_bias", "action", "action_given", "draw_time", "history_bias")


def told_shapes(config: ModelConfig, batch: int) -> Shapes:
    """What the host tells the graphs of a frame, by the names of their inputs (`tell`)."""
    table = components(config)
    specs = {s.name: s for name in ("temporal", "spatial_first") for s in table[name].inputs}
    return {
        name: (tuple(batch if d == "B" else int(d) for d in specs[name].dims), "float32")
        for name in TOLD
        if name in specs
    }


def tell(
    host: Mapping[str, Array], config: ModelConfig, time: int, since: Int64, action: Float32 | None
) -> int:
    """Fill arrays of `told_shapes` for frame `time` of videos that began at `since` (B,); the ring
    slot that it will write."""
    slot = time % config.context_frames
    held = time - 1 - (time - 1 - np.arange(config.context_frames)) % config.context_frames
    host["is_first"][:] = since == time
    host["cache_bias"][:] = np.where(held >= since[:, None], 0.0, MASKED)
    host["cache_bias"][:, slot] = MASKED
    host["time"][:] = time_rotation(time, config.time_rotary_pairs)
    if "history_bias" in host:  # once the slot is written, and for the frame after it
        host["history_bias"][:] = host["cache_bias"]
        host["history_bias"][:, slot] = 0.0
        host["draw_time"][:] = time_rotation(time + 1, config.time_rotary_pairs)
    if config.action_dim:
        host["action_given"].fill(float(action is not None))
        host["action"][:] = 0.0 if action is None else action
    return slot


def noise_shapes(config: ModelConfig, batch: int) -> Shapes:
    """The noise that enters the graphs, by the names of their inputs."""
    latent = (config.tokens, config.autoencoder.latent_channels)
    group = (batch, *config.group_shape)
    return {
        "flow_noise": ((*group, *latent), "float32"),
        "frame_noise": ((batch, *latent), "float32"),
        "canvas_noise": ((*group, config.tokens, config.dim), "float32"),
    }


def row_index(name: str, row: int) -> Index:
    """Where video `row` is in an array of a snapshot: rings have their slots in front."""
    return (slice(None), row) if name.startswith("cache_") else (row,)


def state_shapes(config: ModelConfig, batch: int) -> Shapes:
    """Shape and dtype ("hidden" for the bundle's) of the arrays of a snapshot. `before` are the
    autoencoder's histories before the latest frame."""
    ae = config.autoencoder
    shapes: Shapes = {
        "latent": ((batch, config.tokens, ae.latent_channels), "float32"),
    }
    ring = (config.context_frames, batch, config.temporal_tokens, config.dim)
    for i in range(config.temporal_layers):
        shapes |= {f"cache_{kind}_{i}": (ring, "hidden") for kind in ("key", "value")}
    for part in ("encoder", "decoder"):
        histories = autoencoder_states(ae, decoder=part == "decoder")
        for name in (part, f"{part}_before"):
            shapes |= {f"{name}_{i}": ((batch, *s), "hidden") for i, s in enumerate(histories)}
    return shapes


def require_finite(engine: str, component: str, values: Float32) -> None:
    """
    Raises:
        NotFiniteError: if a value is not finite.
    """
    if not np.isfinite(values).all():
        raise NotFiniteError(
            f"{component}: engine {engine} returned values that are not finite; unless actions or "
            "latents far outside the model's were given, run 'canvasmar-rt verify' on this bundle "
            "and engine; go back with restore(state) or reset()"
        )
