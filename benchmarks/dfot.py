"""DFoT (Diffusion Forcing Transformer, Song et al. 2025), the baseline of Fig. 6a and 8.

DiT3D over the tokens of a whole chunk of latent frames, the same latents and autoencoder as the
CanvasMAR model it is measured against. It runs on the engine that model runs on, with random
weights: what is compared is time. Importing this module needs no PyTorch; running it does, since
the network is made here (`canvasmar_rt.benchmarks.dfot_model`).

Letters as in `canvasmar_rt.config`, with T the latent frames of the chunk, S DDIM steps, G guidance
passes; t is pixel frames per latent frame.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import numpy.typing as npt

from canvasmar_rt.benchmarks.contestants import Played
from canvasmar_rt.bundle import Bundle, ComponentEntry, TensorEntry
from canvasmar_rt.config import ModelConfig
from canvasmar_rt.engines.memory import Array, Buffer, Run
from canvasmar_rt.engines.onnxruntime_engine import OnnxRuntimeEngine
from canvasmar_rt.engines.program import Clock, Float32, Shapes, UInt8
from canvasmar_rt.errors import ConfigError, EngineError, InputError, need_torch
from canvasmar_rt.noise import Purpose, fill_normal
from canvasmar_rt.rollout import Predictor

if TYPE_CHECKING:
    from canvasmar_rt.benchmarks.dfot_model import Dfot
    from canvasmar_rt.engines.base import Engine

Guidance = Literal["conditional", "vanilla"]
"""History guidance: the history is given, or v = v_u + w (v_c - v_u) over a pass with and one
without it."""

SIZES = {"S": (384, 12), "B": (768, 12), "L": (1024, 24), "XL": (1152, 28)}
"""Width and layers of the published sizes."""

HEAD_DIM = {"S": 64, "B": 64, "L": 64, "XL": 72}

STEPS = 50
LEVELS = 1000
"""Noise levels of training; the highest is pure noise."""

COSINE_OFFSET = 0.008
"""s of the cosine schedule (Nichol and Dhariwal 2021)."""

VANILLA_SCALE = 1.5
"""w of vanilla guidance, of no effect on the time."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DfotConfig:
    """DiT3D with patch 1 over a chunk of `frames` latent frames of `grid` (rows, columns) tokens of
    `channels`; noise levels are per frame. `modulation`: adaLN computed once per frame, or, as the
    public code does, once per token."""

    width: int
    layers: int
    heads: int
    frames: int
    grid: tuple[int, int]
    channels: int
    modulation: Literal["frame", "token"] = "frame"


def dfot_for(model: ModelConfig, size: str = "XL") -> DfotConfig:
    """The DFoT that stands to `model` as DFoT of this size stands to the paper's kinetics600 (width
    1024, 40 layers in all): width and layers scaled by the same factors, over the same chunk of
    latents. The head size stays, so the width is rounded to a multiple of it.

    Raises:
        ConfigError: if there is no such size.
    """
    if size not in SIZES:
        raise ConfigError(f"no DFoT size {size!r}; sizes are {', '.join(SIZES)}")
    width, layers = SIZES[size]
    heads = max(1, round(width * model.dim / 1024 / HEAD_DIM[size]))
    depth = model.temporal_layers + model.canvas_layers + model.spatial_layers
    ae = model.autoencoder
    return DfotConfig(
        width=heads * HEAD_DIM[size],
        layers=max(1, round(layers * depth / 40)),
        heads=heads,
        frames=model.context_frames,
        grid=(ae.latent_height, ae.latent_width),
        channels=ae.latent_channels,
    )


# -- sampling


def signal(level: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Square root of the share of the signal at noise levels -1 (clean) to LEVELS - 1."""
    s = COSINE_OFFSET
    angle = 0.5 * np.pi * ((level + 1) / LEVELS + s) / (1 + s)
    return np.asarray(np.cos(angle) / np.cos(0.5 * np.pi * s / (1 + s)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """DDIM (eta 0) over a chunk whose frames are at different noise levels, all float32.

    levels: (S, G, T), what the network is told: 0 for history that is given, LEVELS - 1 for history
        that is not.
    weights: (G,), of each pass in the guided v.
    keep, move: (S, T): x <- keep * x + move * v. History keeps everything and does not move.
    """

    levels: Float32
    weights: Float32
    keep: Float32
    move: Float32

    def inputs(self) -> dict[str, Float32]:
        """The arrays by the names of the graph's inputs."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def check_frames(chunk: int, context: int, frames: int) -> None:
    """
    Raises:
        ConfigError: if `frames` after `context` latent frames do not complete the chunk.
    """
    if frames != chunk - context:
        raise ConfigError(
            f"dfot: it denoises {chunk} latent frames at once and {context} are given, so it plays "
            f"{chunk - context}, not {frames}"
        )


def schedule(frames: int, context: int, guidance: Guidance, *, steps: int = STEPS) -> Schedule:
    """The first `context` of `frames` latent frames are history, the others go together from pure
    noise to clean in `steps` steps of equally many levels of the cosine schedule. v is what the
    network predicts: with signal a and noise s, x_0 = a x - s v and eps = s x + a v."""
    level = np.linspace(LEVELS - 1, -1, steps + 1).astype(np.int64)
    a = signal(level)
    s = np.sqrt(np.maximum(0.0, 1.0 - a**2))
    keep, move = np.ones((steps, frames)), np.zeros((steps, frames))
    keep[:, context:] = (a[1:] * a[:-1] + s[1:] * s[:-1])[:, None]
    move[:, context:] = (s[1:] * a[:-1] - a[1:] * s[:-1])[:, None]
    history, weights = [0], [1.0]
    if guidance == "vanilla":
        history, weights = [0, LEVELS - 1], [VANILLA_SCALE, 1.0 - VANILLA_SCALE]
    levels = np.zeros((steps, len(history), frames))
    levels[:, :, :context] = np.array(history)[:, None]
    levels[:, :, context:] = level[:-1, None, None]
    return Schedule(
        levels=levels.astype(np.float32),
        weights=np.array(weights, np.float32),
        keep=keep.astype(np.float32),
        move=move.astype(np.float32),
    )


def step_component(config: DfotConfig, guidance: Guidance) -> ComponentEntry:
    """The graph of one DDIM update, described as a bundle describes its components. `step` is the
    row of the schedule; both outputs are the inputs of the next update."""
    passes = 2 if guidance == "vanilla" else 1
    chunk = ("B", config.frames, config.grid[0] * config.grid[1], config.channels)
    noise = (TensorEntry(name="noise", dtype="float32", dims=chunk),) if passes == 2 else ()
    return ComponentEntry(
        file="dfot.onnx",
        inputs=(
            TensorEntry(name="x", dtype="float32", dims=chunk),
            TensorEntry(name="step", dtype="int64", dims=(1,)),
            TensorEntry(name="levels", dtype="float32", dims=("S", passes, config.frames)),
            TensorEntry(name="weights", dtype="float32", dims=(passes,)),
            TensorEntry(name="keep", dtype="float32", dims=("S", config.frames)),
            TensorEntry(name="move", dtype="float32", dims=("S", config.frames)),
            *noise,
        ),
        outputs=(
            TensorEntry(name="next_x", dtype="float32", dims=chunk),
            TensorEntry(name="next_step", dtype="int64", dims=(1,)),
        ),
    )


def shapes_of(tensors: Sequence[TensorEntry], batch: int) -> Shapes:
    """Shapes and dtypes by name, at a batch size."""
    return {
        t.name: (tuple(batch if d == "B" else int(d) for d in t.dims), t.dtype) for t in tensors
    }


# -- runners


class Runner(Protocol):
    """DFoT and the bundle's decoder on fixed memory, at one batch size.

    x, noise: host arrays float32 (B, T, N, C) that `denoise` starts from: the chunk, and what takes
    the place of its history in the unconditional pass (None without one)."""

    x: Float32
    noise: Float32 | None

    def warmup(self) -> None:
        """Do now what the first clip would otherwise wait for."""

    def denoise(self) -> Float32:
        """All updates of `x`; the result (B, T, N, C) stays valid until the next call."""

    def rewind(self, states: Sequence[Array]) -> None:
        """Make these the decoder's histories, as a rollout's state holds them."""

    def decode(self, latent: Float32) -> UInt8:
        """Latents (B, N, C) of the next frame -> uint8 (B, t, H, W, 3), valid until the next
        call."""


class BoundDecoder:
    """The decoder of an engine's bundle, one latent frame at a time."""

    def __init__(self, engine: Engine, batch: int) -> None:
        entry = engine.bundle.manifest.components["decoder"]
        self._memory = engine.memory()
        states = shapes_of(entry.inputs, batch)
        latent, frames = states.pop("latent"), shapes_of(entry.outputs, batch)["frames"]
        self._latent = self._memory.group({"latent": latent})
        self._frames = self._memory.group({"frames": frames})
        self._sides = [self._memory.group(states, mirrored=False).buffers for _ in range(2)]
        self._side = 0  # which set of histories is read next
        self._runs: list[Run] = [
            engine.bind(
                "decoder",
                {**self._latent.buffers, **self._sides[side]},
                {
                    **self._frames.buffers,
                    **{f"next_{name}": x for name, x in self._sides[1 - side].items()},
                },
                self._memory,
            )
            for side in (0, 1)
        ]

    def rewind(self, states: Sequence[Array]) -> None:
        self._side = 0
        for buffer, values in zip(self._sides[0].values(), states, strict=True):
            self._memory.write(buffer, values)

    def decode(self, latent: Float32) -> UInt8:
        _host(self._latent.buffers["latent"])[...] = latent
        self._latent.upload()
        self._runs[self._side]()
        self._side ^= 1
        self._frames.download()
        self._memory.synchronize()
        return _host(self._frames.buffers["frames"])


class OnnxRunner:
    """ONNX Runtime: the update, exported as the model was, is the one component of a bundle of its
    own, which an engine with the model's options runs. x and the step go back and forth between two
    buffers."""

    def __init__(
        self,
        engine: OnnxRuntimeEngine,
        network: Dfot,
        guidance: Guidance,
        plan: Schedule,
        batch: int,
    ) -> None:
        from canvasmar_rt.benchmarks.dfot_model import export_dfot

        component = step_component(network.config, guidance)
        manifest = dataclasses.replace(
            engine.bundle.manifest, components={"dfot": component}, files={}
        )
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as work:
            path = Path(work) / component.file
            int8 = manifest.quantization == "int8"
            export_dfot(network, guidance, path, opset=manifest.opset, int8=int8)
            own = engine.like(Bundle(Path(work), manifest))
        self._memory = own.memory()
        self._steps = len(plan.keep)
        table = {name: (v.shape, "float32") for name, v in plan.inputs().items()}
        given = [t for t in component.inputs if t.name not in table]
        moving = shapes_of(component.inputs[:2], batch)
        self._given = self._memory.group(shapes_of(given, batch))
        spare = self._memory.group(moving, mirrored=False).buffers
        fixed = self._memory.group(table)
        for name, values in plan.inputs().items():
            _host(fixed.buffers[name])[...] = values
        fixed.upload()
        self._both = [self._given.buffers, spare]
        self._runs: list[Run] = [
            own.bind(
                "dfot",
                {
                    **self._given.buffers,
                    **fixed.buffers,
                    **{name: self._both[side][name] for name in moving},
                },
                {f"next_{name}": self._both[1 - side][name] for name in moving},
                self._memory,
            )
            for side in (0, 1)
        ]
        self._decoder = BoundDecoder(engine, batch)
        self.rewind, self.decode = self._decoder.rewind, self._decoder.decode
        self.x = _host(self._given.buffers["x"])
        self.noise = _host(self._given.buffers["noise"]) if guidance == "vanilla" else None

    def warmup(self) -> None:
        self._run(2)
        for _ in (0, 1):
            self.decode(self.x[:, 0])

    def denoise(self) -> Float32:
        self._run(self._steps)
        return self._memory.read(self._both[self._steps % 2]["x"])

    def _run(self, steps: int) -> None:
        _host(self._given.buffers["step"])[...] = 0
        self._given.upload()
        for i in range(steps):
            self._runs[i % 2]()
        self._memory.synchronize()


def _host(buffer: Buffer) -> Array:
    assert buffer.host is not None
    return buffer.host


def make_runner(
    predictor: Predictor, config: DfotConfig, guidance: Guidance, plan: Schedule, *, batch: int,
    seed: int,
) -> Runner:  # fmt: skip
    """DFoT of random weights on a predictor's engine, in its bundle's dtype.

    Raises:
        EngineError: on an engine other than onnxruntime and torch, or without PyTorch and ONNX.
    """
    engine = predictor.engine
    if engine.name not in ("onnxruntime", "torch"):
        raise EngineError(
            f"the DFoT baseline runs on the engines onnxruntime and torch, not on {engine.name}"
        )
    need_torch("the DFoT baseline")
    import torch

    from canvasmar_rt.benchmarks.dfot_model import TorchRunner, build_dfot
    from canvasmar_rt.engines.torch_engine import TorchEngine

    network = build_dfot(config, seed=seed, dtype=getattr(torch, predictor.bundle.manifest.dtype))
    if isinstance(engine, TorchEngine):
        return TorchRunner(engine, network, guidance, plan, batch)
    assert isinstance(engine, OnnxRuntimeEngine)
    return OnnxRunner(engine, network, guidance, plan, batch)


# -- the contestant


class DfotContestant:
    """DFoT continuing a clip up to the end of its chunk, on the engine and with the autoencoder of
    `predictor`.

    latents, frames: of the last clip played, float32 (B, n, N, C) and uint8 (B, n, t, H, W, 3) for
        n predicted latent frames.
    """

    chunked = True

    def __init__(
        self,
        predictor: Predictor,
        context: UInt8,
        *,
        batch: int,
        size: str = "XL",
        guidance: Guidance = "conditional",
        seed: int = 0,
    ) -> None:
        """`context`: uint8 (1+n*t, H, W, 3), continued by every video of the batch; row b draws its
        noise from stream b.

        Raises:
            ConfigError: no such size.
            InputError: a context of the wrong shape, or that leaves nothing to predict.
            EngineError: on an engine the baseline does not run on, or without PyTorch and ONNX.
        """
        self.name = "dfot" if guidance == "conditional" else f"dfot-{guidance}"
        self._engine = predictor.engine.name
        self._seed, self._batch = seed, batch
        config = dfot_for(predictor.config, size)
        self._history, self._decoder_start = _encoded(predictor, context, batch, config.frames)
        known = self._history.shape[1]
        plan = schedule(config.frames, known, guidance)
        self._runner = make_runner(predictor, config, guidance, plan, batch=batch, seed=seed)
        from canvasmar_rt.benchmarks.dfot_model import evaluation_flops, parameters

        self.described: dict[str, object] = {
            "size": size,
            "width": config.width,
            "layers": config.layers,
            "heads": config.heads,
            "parameters": parameters(config),
            "steps": STEPS,
            "guidance": guidance,
            "modulation": config.modulation,
            "evaluation_flops": {
                way: evaluation_flops(dataclasses.replace(config, modulation=way))
                for way in ("frame", "token")
            },
            "arithmetic": predictor.bundle.manifest.dtype,
            "quantization": predictor.bundle.manifest.quantization,
            "engine": self._engine,
            "device": predictor.engine.device,
        }
        ae = predictor.config.autoencoder
        n, t = config.frames - known, ae.temporal_compression
        self.frames = np.zeros((batch, n, t, ae.height, ae.width, 3), np.uint8)
        self.latents = np.zeros((batch, n, *self._history.shape[2:]), np.float32)
        self._runner.rewind(self._decoder_start)
        self._runner.warmup()

    def play(self, frames: int) -> Played:
        """See `canvasmar_rt.benchmarks.contestants.Contestant`.

        Raises:
            ConfigError: for any number of frames but those that complete the chunk.
            EngineError: the engine returned values that are not finite.
        """
        known = self._history.shape[1]
        check_frames(known + self.frames.shape[1], known, frames)
        self._runner.rewind(self._decoder_start)
        ready, decoding = [], []
        clock = Clock()
        self._draw()
        clock.lap("noise")
        self.latents[...] = self._runner.denoise()[:, known:]
        if not np.isfinite(self.latents).all():
            raise EngineError(
                f"dfot: engine {self._engine} returned values that are not finite; its random "
                "weights may overflow in float16: use a float32 or bfloat16 bundle"
            )
        clock.lap("denoise")
        for i in range(frames):
            self.frames[:, i] = self._runner.decode(self.latents[:, i])
            clock.lap("decoder")
            ready.append(clock.elapsed)
            decoding.append(clock.timings["decoder"])
        return Played(tuple(ready), tuple(decoding), clock.timings)

    def _draw(self) -> None:
        """The history and noise; without the history there is noise in its place."""
        known = self._history.shape[1]
        self._runner.x[:, :known] = self._history
        drawn = [(self._runner.x, range(known, self._runner.x.shape[1]))]
        if self._runner.noise is not None:
            drawn.append((self._runner.noise, range(known)))
        for out, frames in drawn:
            for i in frames:
                fill_normal(
                    out[:, i], seed=self._seed, streams=range(self._batch), frame=i,
                    purpose=Purpose.FLOW,
                )  # fmt: skip


def _encoded(
    predictor: Predictor, context: UInt8, batch: int, chunk: int
) -> tuple[Float32, list[Array]]:
    """Latents (B, n, N, C) of a context and the decoder's histories after it.

    Raises:
        InputError: a context of the wrong shape, or that leaves nothing of the chunk to predict.
    """
    t = predictor.config.autoencoder.temporal_compression
    groups, rest = divmod(len(context) - 1, t)
    if rest or not 0 <= groups < chunk - 1:
        raise InputError(
            f"dfot: expected a context of 1 + n*{t} frames that leaves part of a chunk of {chunk} "
            f"latent frames, so at most {1 + (chunk - 2) * t}; got {len(context)}"
        )
    rollout = predictor.start(context[:1], batch=batch)
    latents = [rollout.state().arrays["latent"]]
    for i in range(groups):
        latents.append(rollout.observe(context[1 + i * t : 1 + (i + 1) * t]))
    arrays = rollout.state().arrays
    count = sum(name.startswith("decoder_before_") for name in arrays)
    return np.stack(latents, axis=1), [arrays[f"decoder_{i}"] for i in range(count)]
