"""What our rollout is measured against: the same model run in the ways one would try first.

`EagerContestant` is the reference sampler in PyTorch, as it is or through torch.compile,
`NaiveOnnxContestant` a plain ONNX export in a Python loop. Both compute our video: the same
weights, noise, order and solver. `without_canvas` gives the baseline of the paper's Fig. 3.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime as ort

from canvasmar_rt.benchmarks.contestants import Played, check_groups
from canvasmar_rt.benchmarks.random_models import random_like
from canvasmar_rt.components import MASKED, autoencoder_states
from canvasmar_rt.config import SamplingConfig, convolution_layers, to_dict
from canvasmar_rt.engines.base import cuda_index
from canvasmar_rt.engines.program import Clock, Float32, Int64, Noise, NoiseKey, UInt8
from canvasmar_rt.errors import EngineError, need_torch
from canvasmar_rt.rollout import Predictor
from canvasmar_rt.schedule import (
    ar_steps,
    flow_plan,
    generation_order,
    guidance_branches,
    set_sizes,
    time_rotation,
)

if TYPE_CHECKING:
    from torch import Tensor

    from canvasmar_rt.models.canvasmar import CanvasMAR, FrameModel
    from canvasmar_rt.models.sampler import State

Dims = tuple[int | str, ...]


def _start(model: FrameModel, context: UInt8, batch: int) -> State:
    """The reference sampler's state after a context (T, H, W, 3) or (B, T, H, W, 3)."""
    import torch

    from canvasmar_rt.models import sampler

    clip = context if context.ndim == 5 else context[None]
    frames = torch.tensor(np.broadcast_to(clip, (batch, *clip.shape[1:])))
    frames = frames.to(model.device)
    return _own(sampler.start(model, sampler.encode(model, frames)))


def _own(state: State) -> State:
    """The state with contiguous copies of its views: the same strides in every frame, so that
    nothing is compiled again, and no memory that CUDA graphs write over in the next."""
    import torch

    def copy(x: Tensor) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    return dataclasses.replace(
        state, latent=copy(state.latent), decoder=tuple(copy(x) for x in state.decoder)
    )


def _described(
    predictor: Predictor, sampling: SamplingConfig, engine: str, dtype: str
) -> dict[str, object]:
    return {
        "engine": engine,
        "device": predictor.engine.device,
        "arithmetic": dtype,
        "weights": dtype,
        "sampling": to_dict(sampling),
    }


def _dtype(predictor: Predictor, engine: str) -> str:
    """What a bundle's weights are computed in beside `engine`: its own dtype, but float32 where
    that is ONNX Runtime on the CPU, which has kernels for no other."""
    plain = engine == "onnxruntime" and predictor.engine.device == "cpu"
    return "float32" if plain else predictor.bundle.manifest.dtype


class EagerContestant:
    """The reference sampler (`canvasmar_rt.models.sampler`) on the bundle's weights.

    With `compile` its calls into the model go through torch.compile at fixed shapes, on a GPU in
    mode "reduce-overhead" (CUDA graphs): one program for each set size of each network. The order,
    the guidance sum and the solver stay eager: torch.compile does not take the sampler as a whole,
    which orders tokens in NumPy and counts frames in Python.
    """

    chunked = False

    def __init__(
        self,
        predictor: Predictor,
        context: UInt8,
        *,
        batch: int,
        seed: int,
        sampling: SamplingConfig | None = None,
        threads: int | None = None,
        compile: bool = False,
    ) -> None:
        """
        Args:
            context, batch, seed, sampling: as `Predictor.start` takes them.
            threads: CPU threads of all of PyTorch; its own choice if None.

        Raises:
            EngineError: no PyTorch, no such device, or nothing torch.compile could build with.
        """
        what = "the compiled sampler" if compile else "the eager sampler"
        need_torch(what)
        import torch

        from canvasmar_rt.engines.torch_engine import load_model, torch_device
        from canvasmar_rt.models.families import cast

        self.name = "compile" if compile else "eager"
        self._batch, self._seed = batch, seed
        self._sampling, self._compile = sampling or predictor.sampling, compile
        self._device = torch_device(predictor.engine.device)
        if threads is not None:
            torch.set_num_threads(threads)
        dtype = _dtype(predictor, predictor.engine.name)
        self._model = cast(load_model(predictor.bundle), getattr(torch, dtype)).to(self._device)
        self._start = _start(self._model, context, batch)
        self.described: Mapping[str, object] = _described(
            predictor, self._sampling, f"torch {self.name}", dtype
        )
        if compile:
            self._compile_model()
        self._decodings: list[tuple[Any, Any]] = []
        self._time_decoder()
        # CUDA graphs are recorded some calls after the one that compiles
        self._warm_up(self._model.config.group * (1 if self._device.type == "cpu" else 4))

    def _compile_model(self) -> None:
        import torch

        from canvasmar_rt.models.canvasmar import CanvasMAR

        m = self._model
        calls: list[tuple[torch.nn.Module, str]] = [
            (m.temporal, "step"),
            (m.flow, "embed_time"),
            (m.flow, "embed_condition"),
            (m.flow, "velocity"),
            (m.autoencoder, "decode"),
        ]
        if isinstance(m, CanvasMAR):
            calls += [(m.spatial, "forward"), (m.spatial, "condition_keys_values")]
        else:
            calls.append((m.temporal, "draw"))
        if m.canvas is not None:
            calls.append((m.canvas, "forward"))
        mode = "default" if self._device.type == "cpu" else "reduce-overhead"
        for module, method in calls:
            made = torch.compile(getattr(module, method), dynamic=False, mode=mode)
            setattr(module, method, made)

    def _time_decoder(self) -> None:
        """Note when the decoder begins and ends, on a GPU without waiting for it."""
        decode = self._model.autoencoder.decode

        def timed(latents: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
            begun = self._now()
            made = decode(latents, states)
            self._decodings.append((begun, self._now()))
            return made

        self._model.autoencoder.decode = timed  # type: ignore[method-assign]

    def _now(self) -> Any:
        import torch

        if self._device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _warm_up(self, frames: int) -> None:
        """
        Raises:
            EngineError: if torch.compile fails.
        """
        if not self._compile:
            self.play(frames)
            return
        import torch._dynamo

        # every set size is a program of its own, and past the usual limit the rest would run eager
        limits = {"recompile_limit": 1024, "accumulated_recompile_limit": 1024}
        try:
            with warnings.catch_warnings(), torch._dynamo.config.patch(limits):
                warnings.simplefilter("ignore")
                self.play(frames)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            cause = error.inner_exception
            raise EngineError(
                f"torch.compile failed ({type(cause).__name__}: {str(cause).splitlines()[0]}); on "
                "the CPU it needs a C++ compiler (g++, or the one that CXX names), on a GPU Triton "
                "and a C compiler"
            ) from None

    def _frame(self, state: State) -> tuple[State, UInt8]:
        """The state after the next latent frame, and its pixels (B, t, H, W, 3)."""
        import torch

        from canvasmar_rt.models import sampler

        noise = sampler.draw_noise(
            self._model.config, self._sampling,
            seed=self._seed, streams=range(self._batch), frame=state.time,
        )  # fmt: skip
        parts = {f.name: getattr(noise, f.name) for f in dataclasses.fields(noise)}
        noise = sampler.FrameNoise(**{k: x.to(self._device) for k, x in parts.items()})
        if self._compile:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
        state, sample = sampler.step(self._model, self._sampling, state, noise)
        if self._compile:
            state = _own(state)
        pixels: UInt8 = sample.frames.cpu().numpy()
        return state, pixels

    def play(self, frames: int) -> Played:
        """See `Contestant`."""
        check_groups(frames, self._model.config.group)
        state, decoder = self._start, 0.0
        ready, decoding = list[float](), list[float]()
        self._decodings.clear()
        group = self._model.config.group  # the pixels of a group are there at once
        begun = time.perf_counter()
        while len(ready) < frames:
            state, _ = self._frame(state)
            ready += [time.perf_counter() - begun] * group
        for a, b in self._decodings:
            decoder += b - a if self._device.type == "cpu" else 1e-3 * a.elapsed_time(b)
            decoding += [decoder] * group
        return Played(tuple(ready), tuple(decoding), {"decoder": decoder})


@dataclasses.dataclass(frozen=True, kw_only=True)
class _State:
    """What the plain ONNX loop carries: the latest latent (B, N, C), latent frames seen, keys and
    values of the last F frames, oldest first, (F, 2L, B, P, D), the decoder's histories."""

    latent: Float32
    time: int
    cache: Float32
    decoder: tuple[Float32, ...]


class NaiveOnnxContestant:
    """A plain ONNX export run from a Python loop: what a competent engineer writes in a day.

    The reference sampler with NumPy in place of PyTorch's operators and one `session.run` for each
    call into a network; the networks are exported as they are, by `torch.onnx.export`'s defaults.

    It batches the guidance branches, leaves batch and set sizes as dynamic axes, computes the
    condition's keys and values once a frame and the flow's part of them once a set, and draws only
    the tokens of a set. It does not bind buffers (every call takes and returns new arrays), loop
    inside a graph (the flow head is called for every evaluation and set), keep the KV cache in
    place (it is one array, shifted by a frame), skip tokens of later sets in the last spatial
    layer, or tune sessions beyond the number of threads (pools go on spinning into the next call).
    """

    chunked = False

    def __init__(
        self,
        predictor: Predictor,
        context: UInt8,
        *,
        batch: int,
        seed: int,
        sampling: SamplingConfig | None = None,
        threads: int | None = None,
    ) -> None:
        """
        Args:
            context, batch, seed, sampling: as `Predictor.start` takes them.
            threads: CPU threads of a session; ONNX Runtime's choice if None.

        Raises:
            EngineError: PyTorch or ONNX is missing, or ONNX Runtime cannot run on the predictor's
                device.
        """
        need_torch("the plain ONNX export")
        import torch

        from canvasmar_rt.engines.torch_engine import load_model
        from canvasmar_rt.models.canvasmar import CanvasMAR
        from canvasmar_rt.models.families import cast

        self.name = "naive-onnx"
        self._config, self._sampling = predictor.config, sampling or predictor.sampling
        self._batch, self._seed = batch, seed
        dtype = _dtype(predictor, "onnxruntime")
        self.described: Mapping[str, object] = _described(
            predictor, self._sampling, "onnxruntime, plain", dtype
        )
        model = load_model(predictor.bundle)
        if not isinstance(model, CanvasMAR) or self._config.group > 1:
            raise EngineError(
                f"naive-onnx: exports the networks of CanvasMAR that draws frame by frame, and "
                f"{self._config.name} is another kind; leave this baseline out"
            )
        self._start = _as_numpy(_start(model, context, batch), self._config.context_frames)
        cast(model, getattr(torch, dtype))
        self._mask = model.spatial.mask.detach().float().numpy()
        self._no_temporal = model.spatial.no_temporal.detach().float().numpy()
        n, c = self._config.tokens, self._config.autoencoder.latent_channels
        self._noise = Noise(
            flow=np.empty((batch, n, c), np.float32),
            frame=np.empty((batch, n, c), np.float32),
            canvas=np.empty((batch, n, self._config.dim), np.float32),
            order=np.empty((batch, self._sampling.ar_steps, n), np.float32),
        )
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            self._networks = {
                name: (
                    _session(
                        _export(model, function, inputs, Path(folder) / f"{name}.onnx"),
                        predictor.engine.device,
                        threads,
                    ),
                    tuple(inputs),
                )
                for name, (function, inputs) in _networks(model).items()
            }
        self.play(1)

    def _run(self, network: str, *inputs: np.ndarray) -> list[Any]:
        session, names = self._networks[network]
        made: list[Any] = session.run(None, dict(zip(names, inputs, strict=True)))
        return made

    def _temporal(self, state: _State) -> tuple[Float32, Float32]:
        """z_t (B, P, D), and the cache with this frame in it."""
        c, b = self._config, self._batch
        bias = np.full((b, c.context_frames), MASKED, np.float32)
        seen = min(state.time, c.context_frames - 1)
        bias[:, c.context_frames - seen :] = 0.0
        no_action = [np.zeros((b, c.action_dim), np.float32), np.zeros(b, np.float32)]
        z_temporal, new = self._run(
            "temporal",
            state.latent,
            np.zeros(b, np.float32),
            time_rotation(state.time, c.time_rotary_pairs),
            bias,
            state.cache,
            *(no_action if c.action_dim else []),
        )
        return z_temporal, np.concatenate([state.cache[1:], new[None]])

    def _frame(self, state: _State, clock: Clock) -> tuple[_State, UInt8]:
        """The state after the next latent frame, and its pixels (B, t, H, W, 3)."""
        sampling, noise = self._sampling, self._noise
        NoiseKey(
            sampling=sampling,
            seed=self._seed,
            streams=tuple(range(self._batch)),
            since=(0,) * self._batch,
            frame=state.time,
            has_canvas=self._config.canvas,
        ).draw(noise)
        clock.lap("noise")
        z_temporal, cache = self._temporal(state)
        clock.lap("temporal")
        z_canvas, staticness = np.broadcast_to(self._mask, noise.canvas.shape), None
        if self._config.canvas:
            r, r2 = sampling.frame_noise, sampling.canvas_noise
            noised = state.latent * (1 - r) + noise.frame * r
            z_canvas, staticness = self._run("canvas", z_temporal, noised)
            z_canvas = z_canvas * (1 - r2) + noise.canvas * r2
            clock.lap("canvas")
        order = np.empty(noise.flow.shape[:2], np.int64)
        generation_order(staticness, noise.order, sampling, order)
        clock.lap("order")
        latent = np.zeros_like(noise.flow)
        if self._config.residual:
            latent += state.latent
        self._draw(latent, z_temporal, z_canvas, order, clock)
        pixels, *decoder = self._run("decoder", latent, *state.decoder)
        clock.lap("decoder")
        after = _State(latent=latent, time=state.time + 1, cache=cache, decoder=tuple(decoder))
        return after, pixels

    def _draw(
        self, latent: Float32, z_temporal: Float32, z_canvas: Float32, order: Int64, clock: Clock
    ) -> None:
        """The tokens of a frame, set by set, into `latent` (B, N, C): zeros, or what a residual
        model adds to."""
        c, noise, plan = self._config, self._noise.flow, flow_plan(self._sampling)
        branches = guidance_branches(self._sampling, has_canvas=c.canvas)
        g, b = len(branches.weight), self._batch
        condition = _rows(branches.temporal_on, z_temporal, self._no_temporal)
        canvas = _rows(branches.canvas_on, z_canvas, self._mask)
        weight = branches.weight[:, None, None, None]
        if c.condition_attention == "isolated":
            (condition,) = self._run("condition", condition)
            clock.lap("condition")
        for step in ar_steps(c.tokens, self._sampling.ar_steps):
            drawn, left = order[:, : step.known], order[:, step.known :]
            chosen = left[:, : step.drawn, None]
            (z,) = self._run(
                "spatial",
                condition,
                canvas,
                np.tile(left, (g, 1)),
                np.tile(np.take_along_axis(latent, drawn[..., None], 1), (g, 1, 1)),
                np.tile(drawn, (g, 1)),
            )
            clock.lap("spatial")
            (embedded,) = self._run("embed", z[:, : step.drawn].reshape(g, b, step.drawn, -1))
            x = np.take_along_axis(noise, chosen, 1)
            velocity = np.zeros_like(x)
            for u, new, old in zip(plan.time, plan.step_new, plan.step_old, strict=True):
                (by_branch,) = self._run("velocity", x, u[None], embedded)
                last, velocity = velocity, (weight * by_branch).sum(0)
                x = x + new * velocity + old * last
            if c.residual:
                x += np.take_along_axis(latent, chosen, 1)
            np.put_along_axis(latent, chosen, x, 1)
            clock.lap("flow")

    def play(self, frames: int) -> Played:
        """See `Contestant`."""
        state, clock = self._start, Clock()
        ready, decoding = [], []
        begun = time.perf_counter()
        for _ in range(frames):
            state, _ = self._frame(state, clock)
            ready.append(time.perf_counter() - begun)
            decoding.append(clock.timings["decoder"])
        return Played(tuple(ready), tuple(decoding), clock.timings)


def _as_numpy(state: State, window: int) -> _State:
    """The reference sampler's state, its ring of `window` frames put in order."""
    ring = np.stack([x.numpy() for x in state.caches], axis=1)
    return _State(
        latent=state.latent.numpy(),
        time=state.time,
        cache=ring[[(state.time + i) % window for i in range(window)]],
        decoder=tuple(x.numpy() for x in state.decoder),
    )


def _rows(on: Float32, seen: Float32, hidden: Float32) -> Float32:
    """`seen` (B, n, D) in the guidance branches where `on` (G,) is 1, the vector `hidden` (D,) in
    the others: (G*B, n, D)."""
    kept = on[:, None, None, None]
    rows: Float32 = (kept * seen + (1 - kept) * hidden).reshape(-1, *seen.shape[1:])
    return rows


# -- the networks as they are exported: float32 in and out, whatever the weights' dtype


def _temporal(
    model: CanvasMAR,
    latent: Tensor,
    is_first: Tensor,
    time: Tensor,
    bias: Tensor,
    cache: Tensor,
    *action: Tensor,
) -> tuple[Tensor, Tensor]:
    import torch

    told, given = action or (None, None)
    caches = cache.to(model.spatial.mask.dtype).unbind(1)
    z_temporal, new = model.temporal.step(latent, is_first, told, given, time, bias, caches)
    return z_temporal.float(), torch.stack(new).float()


def _canvas(model: CanvasMAR, z_temporal: Tensor, noised: Tensor) -> tuple[Tensor, Tensor]:
    assert model.canvas is not None
    z = z_temporal.to(model.spatial.mask.dtype)
    z_canvas, _, staticness = model.canvas(z, noised, noised)  # nobody looks at the canvas itself
    return z_canvas.float(), staticness


def _condition(model: CanvasMAR, condition: Tensor) -> Tensor:
    """Keys and values of every spatial layer (2L, R, P, D)."""
    import torch

    made = model.spatial.condition_keys_values(condition.to(model.spatial.mask.dtype))
    return torch.stack([x for kv in made for x in kv]).float()


def _spatial(
    model: CanvasMAR,
    condition: Tensor,
    canvas: Tensor,
    left_index: Tensor,
    tokens: Tensor,
    drawn_index: Tensor,
) -> Tensor:
    """Embeddings of all tokens that are left (R, M, D)."""
    dtype = model.spatial.mask.dtype
    told: Any = condition.to(dtype)
    if model.spatial.isolated:
        told = told.unbind(0)
        told = list(zip(told[::2], told[1::2], strict=True))
    left = left_index.shape[1]
    z = model.spatial(told, canvas.to(dtype), left_index, left, tokens, drawn_index)
    made: Tensor = z.float()
    return made


def _embed(model: CanvasMAR, z: Tensor) -> Tensor:
    return model.flow.embed_condition(z.to(model.spatial.mask.dtype)).float()


def _velocity(model: CanvasMAR, x: Tensor, time: Tensor, embedded: Tensor) -> Tensor:
    embedded = embedded.to(model.spatial.mask.dtype)
    return model.flow.velocity(x, model.flow.embed_time(time)[0], embedded)


def _decoder(model: CanvasMAR, latent: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
    hidden = [x.to(model.spatial.mask.dtype) for x in states]
    frames, new = model.autoencoder.decode(latent[:, None], hidden)
    return frames, *(x.float() for x in new)


def _networks(model: CanvasMAR) -> dict[str, tuple[Callable[..., Any], dict[str, Dims]]]:
    """By name: what is exported, and the dimensions of its inputs. B batch, R rows (guidance
    branches times batch), G branches, K tokens drawn, M tokens left, S tokens of a set; those that
    end in `_index` are int64, all others float32."""
    c, ae = model.config, model.config.autoencoder
    n, p, d, channels = c.tokens, c.temporal_tokens, c.dim, ae.latent_channels
    isolated = c.condition_attention == "isolated"
    temporal: dict[str, Dims] = {
        "latent": ("B", n, channels),
        "is_first": ("B",),
        "time": (2, c.time_rotary_pairs),
        "bias": ("B", c.context_frames),
        "cache": (c.context_frames, 2 * c.temporal_layers, "B", p, d),
    }
    if c.action_dim:
        temporal |= {"action": ("B", c.action_dim), "action_given": ("B",)}
    spatial: dict[str, Dims] = {
        "condition": (2 * c.spatial_layers, "R", p, d) if isolated else ("R", p, d),
        "canvas": ("R", n, d),
        "left_index": ("R", "M"),
        "tokens": ("R", "K", channels),
        "drawn_index": ("R", "K"),
    }
    flow = ("G", "B", "S", d)
    with_time = model.flow.embed_condition(model.spatial.mask).shape[0]
    decoder: dict[str, Dims] = {"latent": ("B", n, channels)}
    for i, shape in enumerate(autoencoder_states(ae, decoder=True)):
        decoder[f"state_{i}"] = ("B", *shape)
    table: dict[str, tuple[Callable[..., Any], dict[str, Dims]]] = {
        "temporal": (_temporal, temporal),
        "spatial": (_spatial, spatial),
        "embed": (_embed, {"z": flow}),
        "velocity": (
            _velocity,
            {"x": ("B", "S", channels), "time": (1,), "embedded": (*flow[:3], with_time)},
        ),
        "decoder": (_decoder, decoder),
    }
    if c.canvas:
        table["canvas"] = (_canvas, {"z_temporal": ("B", p, d), "latent": ("B", n, channels)})
    if isolated:
        table["condition"] = (_condition, {"condition": ("R", p, d)})
    return table


EXAMPLE_SIZES = {"B": 2, "G": 3, "R": 6, "S": 4, "K": 5, "M": 7}
"""Sizes of dynamic dimensions while tracing."""


def _export(
    model: CanvasMAR, function: Callable[..., Any], inputs: Mapping[str, Dims], path: Path
) -> Path:
    """Write `function(model, *inputs)` as ONNX."""
    import torch

    from canvasmar_rt.export.exporter import quiet

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, *args: Tensor) -> Any:
            return function(self.model, *args)

    examples = tuple(
        torch.zeros(
            [EXAMPLE_SIZES[x] if isinstance(x, str) else x for x in dims],
            dtype=torch.int64 if name.endswith("_index") else torch.float32,
        )
        for name, dims in inputs.items()
    )
    dynamic = tuple(
        {i: x for i, x in enumerate(dims) if isinstance(x, str)} for dims in inputs.values()
    )
    with quiet():
        torch.onnx.export(
            Network().eval(),
            examples,
            path,
            dynamo=True,
            dynamic_shapes=(dynamic,),
            input_names=list(inputs),
            verbose=False,
        )
    return path


def _session(path: Path, device: str, threads: int | None) -> ort.InferenceSession:
    """
    Raises:
        EngineError: if ONNX Runtime has no such device.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    provider: tuple[str, dict[str, str]] = ("CPUExecutionProvider", {})
    if device != "cpu":
        index = str(cuda_index("onnxruntime", device))
        provider = ("CUDAExecutionProvider", {"device_id": index, "use_tf32": "0"})
    session = ort.InferenceSession(str(path), options, providers=[provider])
    if session.get_providers()[0] != provider[0]:
        raise EngineError(
            f"the plain ONNX export needs {provider[0]}; this onnxruntime ({ort.__version__}) has "
            f"only {', '.join(ort.get_available_providers())}; docs/install.md says how to get it"
        )
    return session


# -- other models of the same size


def without_canvas(predictor: Predictor, *, ar_steps: int) -> Predictor:
    """The no-canvas MAR of a predictor's size, on its engine and device, by `ar_steps` AR steps.

    The Temporal ViT takes over the Canvas ViT's layers, and for its convolutions as many more as
    have their size. The weights are random, which changes what is predicted, not how long it takes;
    dtypes, graphs and the engine's options are the predictor's.

    Raises:
        EngineError: no PyTorch, or an engine that needs more than a bundle.
        ConfigError: more AR steps than tokens.
    """
    model = predictor.config
    config = dataclasses.replace(
        model,
        name=f"{model.name}-no-canvas",
        canvas=False,
        canvas_conv=0,
        temporal_layers=model.temporal_layers + model.canvas_layers + convolution_layers(model),
    )
    sampling = dataclasses.replace(predictor.sampling, ar_steps=ar_steps)
    set_sizes(config.tokens, ar_steps)  # refuses too many before the export does its work
    return random_like(predictor, config, sampling)
