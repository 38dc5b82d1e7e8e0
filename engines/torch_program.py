"""The whole latent frame in PyTorch over fixed tensors: on CUDA one captured graph.

Everything a frame needs from the host travels in one transfer, the ring slot and the token order
included, and everything it gives comes back in one. In between nothing waits for the host.
"""

from __future__ import annotations

import dataclasses
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from canvasmar_rt.components import components
from canvasmar_rt.config import SamplingConfig
from canvasmar_rt.engines.memory import STORAGE, Array, capturing
from canvasmar_rt.engines.program import (
    Clock,
    Drawn,
    Float32,
    Int64,
    Level,
    Noise,
    Shapes,
    UInt8,
    noise_shapes,
    require_finite,
    row_index,
    state_shapes,
    tell,
    told_shapes,
)
from canvasmar_rt.errors import EngineError
from canvasmar_rt.models.canvasmar import FrameModel
from canvasmar_rt.models.graphs import Graph
from canvasmar_rt.schedule import (
    ArStep,
    ar_steps,
    branch_inputs,
    first_step_branches,
    order_noise,
    order_temperatures,
    solver_inputs,
)

if TYPE_CHECKING:
    from canvasmar_rt.engines.flow_kernel import FlowKernel, Mode

ALIGNMENT = 64


def require_process(process: int) -> None:
    """PyTorch's threads do not survive a fork: a frame in the child would wait for them for good.

    Raises:
        EngineError: if this is not the process of that number.
    """
    if os.getpid() != process:
        raise EngineError(
            "the torch engine was loaded before this process was forked off, without PyTorch's "
            "threads; load it in this process, or start processes by 'spawn'"
        )


@contextmanager
def memory_told() -> Iterator[None]:
    """What runs out of a GPU's memory inside is an `EngineError`, as with the other engines."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        told = " ".join(str(error).split()).partition(" Including")[0].removesuffix(".")
        raise EngineError(f"{told}; use a smaller batch, or end what else holds memory") from None


def _without_tf32(backend: Any, operator: Any) -> Callable[[], None]:
    """Switch TF32 off; what puts it back. PyTorch has two ways to say it, and refuses the older, of
    the `backend`, to whoever took the newer, of the `operator`."""
    try:
        before = backend.allow_tf32
    except RuntimeError:
        precision = operator.fp32_precision
        operator.fp32_precision = "ieee"
        return lambda: setattr(operator, "fp32_precision", precision)
    backend.allow_tf32 = False
    return lambda: setattr(backend, "allow_tf32", before)


class ExactFloat32:
    """float32 convolutions and products without TF32, which cuDNN takes for the former unless told
    otherwise. PyTorch has one flag each for the process, so threads share it: the first to enter
    sets it, the last to leave puts it back."""

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._before: list[Callable[[], None]] = []

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
                pairs = ((cudnn, getattr(cudnn, "conv", None)), (matmul, matmul))
                self._before = [_without_tf32(*pair) for pair in pairs]
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                for put_back in self._before:
                    put_back()


_streams: weakref.WeakSet[Any] = weakref.WeakSet()
_making_stream = threading.Lock()
POOL = 32
"""Streams that PyTorch has of a kind and hands out in turn."""


def own_stream(make: Callable[[], Any]) -> Any:
    """A stream that no other program has, as long as there are any: of two that shared one, the
    work of the second would be recorded into a graph that the first captures."""
    with _making_stream:
        taken = {stream.cuda_stream for stream in _streams}
        for _ in range(POOL):
            stream = make()
            if stream.cuda_stream not in taken:
                break
        _streams.add(stream)
        return stream


exact_float32 = ExactFloat32()


class Parcel:
    """Tensors that travel together: one block on the device and one, pinned, on the host."""

    def __init__(self, layout: Shapes, device: torch.device) -> None:
        places, size = {}, 0
        for name, (shape, dtype) in layout.items():
            nbytes = int(np.prod(shape)) * STORAGE[dtype].itemsize
            places[name] = (size, nbytes)
            size += -(-nbytes // ALIGNMENT) * ALIGNMENT
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)
        self._host = self._device
        if device.type == "cuda":
            self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=True)

        def views(block: Tensor) -> dict[str, Tensor]:
            return {
                name: block[start : start + nbytes].view(getattr(torch, dtype)).view(shape)
                for (name, (shape, dtype)), (start, nbytes) in zip(
                    layout.items(), places.values(), strict=True
                )
            }

        self.tensors = views(self._device)
        self.host: dict[str, Array] = {k: v.numpy() for k, v in views(self._host).items()}

    def upload(self) -> None:
        if self._host is not self._device:
            self._device.copy_(self._host, non_blocking=True)

    def download(self) -> None:
        if self._host is not self._device:
            self._host.copy_(self._device, non_blocking=True)


def draw_order(
    staticness: Tensor | None, gumbel: Tensor, sampling: SamplingConfig, steps: Sequence[ArStep]
) -> Tensor:
    """`canvasmar_rt.schedule.generation_order` on the device: (..., N) int64."""
    tau = order_temperatures(sampling, has_staticness=staticness is not None)
    if staticness is None or sampling.order == "random":
        confidence = torch.zeros_like(gumbel[..., 0, :])
    else:
        confidence = staticness.clamp(min=1e-6).log()
    parts: list[Tensor] = []
    for k, step in enumerate(steps):
        if parts:
            confidence = confidence.scatter(-1, parts[-1], -torch.inf)
        score = confidence + float(tau[k]) * gumbel[..., k, :]
        parts.append(score.sort(dim=-1, descending=True, stable=True).indices[..., : step.drawn])
    return torch.cat(parts, dim=-1)


@dataclasses.dataclass(frozen=True)
class _Level:
    """One way to draw a frame: its sets, its flow plan, its guidance branches with and without a
    canvas."""

    sampling: SamplingConfig
    steps: tuple[ArStep, ...]
    fixed: Mapping[str, Tensor]
    branches: Mapping[bool, Mapping[str, Tensor]]
    first: Mapping[bool, int]


class TorchProgram:
    """See `canvasmar_rt.engines.program.Program`."""

    def __init__(
        self,
        model: FrameModel,
        component: Callable[[str], Graph],
        *,
        name: str,
        batch: int,
        sampling: SamplingConfig,
        graphs: bool,
        flow_kernel: Mode | None = None,
    ) -> None:
        """`component` gives a component's module; `graphs` captures frames on CUDA; `flow_kernel`
        is how `canvasmar_rt.engines.flow_kernel` takes the place of the flow component."""
        self._model, self._component, self._name = model, component, name
        self._config, self._batch = model.config, batch
        self.since = np.zeros(batch, np.int64)
        self._device = model.device
        self._capture = graphs and self._device.type == "cuda"
        self._process = os.getpid()
        self._stream: Any = None
        if self._device.type == "cuda":
            self._stream = own_stream(lambda: torch.cuda.Stream(self._device))
        self._graphs: dict[tuple[Any, ...], Any] = {}
        self._flow_kernel: FlowKernel | None = None
        self._allocate(sampling)
        if flow_kernel is not None:
            from canvasmar_rt.engines.flow_kernel import FlowKernel

            self._flow_kernel = FlowKernel(
                model.flow,
                # a level of fewer AR steps may draw them all at once
                tokens=batch * self._config.group * self._config.tokens,
                branches=max(len(b["branch_weight"]) for b in self._levels[0].branches.values()),
                evaluations=len(self._levels[0].fixed["flow_time"]),
                residual=self._config.residual,
                mode=flow_kernel,
            )
        if self._device.type == "cuda":  # what was packed and cleared is used on another stream
            torch.cuda.current_stream(self._device).synchronize()

    def _allocate(self, sampling: SamplingConfig) -> None:
        c, ae, b = self._config, self._config.autoencoder, self._batch
        n, t = c.tokens, ae.temporal_compression
        latent, pixels = (b, n, ae.latent_channels), (b, t, ae.height, ae.width, 3)
        each = (b, *c.group_shape)
        drawn, film = (*each, *latent[1:]), (b, c.group * t, *pixels[2:])
        told = told_shapes(c, b)
        self._in = Parcel(
            {
                "slot": ((c.group, 1), "int64"),
                "order": ((*each, n), "int64"),
                "own_order": ((1,), "float32"),
                "order_noise": ((*each, sampling.ar_steps, n), "float32"),
                **noise_shapes(c, b),
                # all frames of a group but the last are fed to the Temporal ViT in the same step
                **{f"{n}/{j}": shape for j in range(c.group) for n, shape in told.items()},
            },
            self._device,
        )
        frames = range(c.group)
        self._told = [{n: self._in.tensors[f"{n}/{j}"] for n in told} for j in frames]
        self._told_hosts = [{n: self._in.host[f"{n}/{j}"] for n in told} for j in frames]
        host = self._in.host
        self.noise = Noise(
            flow=host["flow_noise"],
            frame=host["frame_noise"],
            canvas=host["canvas_noise"],
            order=host["order_noise"],
        )
        self._given = Parcel({"frames": (pixels, "uint8")}, self._device)
        self._out = Parcel(
            {
                "order": ((*each, n), "int64"),
                "drawn": (drawn, "float32"),
                "canvas": (drawn, "float32"),
                "staticness": ((*each, n), "float32"),
                "frames": (film, "uint8"),
            },
            self._device,
        )
        self._canvas_frames = Parcel({"frames": (film, "uint8")}, self._device)
        hidden = self._model.dtype
        self._state = {
            name: torch.zeros(
                shape, dtype=hidden if d == "hidden" else torch.float32, device=self._device
            )
            for name, (shape, d) in state_shapes(c, b).items()
        }
        hidden_frames = {
            "z_temporal": (b, c.temporal_tokens, c.dim),
            "z_canvas": (*each, n, c.dim),
        }
        self._work = {
            name: torch.zeros(shape, dtype=hidden, device=self._device)
            for name, shape in hidden_frames.items()
        }
        self._levels: list[_Level] = []
        self.add_level(sampling)

    @property
    def levels(self) -> int:
        return len(self._levels)

    def add_level(self, sampling: SamplingConfig) -> None:
        inputs = {on: branch_inputs(sampling, has_canvas=on) for on in (False, True)}
        branches = {on: self._constants(values) for on, values in inputs.items()}
        table = components(self._config)
        first = {on: first_step_branches(values, table) for on, values in inputs.items()}
        steps = ar_steps(self._config.tokens, sampling.ar_steps)
        fixed = self._constants(solver_inputs(sampling))
        self._levels.append(_Level(sampling, steps, fixed, branches, first))

    def _constants(self, values: Mapping[str, Float32]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(x).to(self._device) for name, x in values.items()}

    # -- the work on the device; every function here can be captured

    def _run(self, component: str, have: Mapping[str, Tensor]) -> dict[str, Tensor]:
        module = self._component(component)
        with exact_float32:
            out = module(*(have[s.name] for s in module.component.inputs))
        return {s.name: x for s, x in zip(module.component.outputs, out, strict=True)}

    def _spatial(self, step: ArStep, have: Mapping[str, Tensor], first: int) -> Tensor:
        """The embeddings of a set; in the first step of the `first` branches, with those of the one
        after them, if any, looked up."""
        if step.known:
            return self._run("spatial", have)["z_tokens"]
        found = []
        if first:
            per_branch = self._component("spatial_first").component.inputs
            seen = {s.name: have[s.name][:first] for s in per_branch if "G" in s.dims}
            found.append(self._run("spatial_first", {**have, **seen})["z_tokens"])
        if first < len(have["branch_weight"]):
            found.append(self._run("unconditional", have)["z_tokens"])
        return torch.cat(found)

    def _flow(self, have: Mapping[str, Tensor]) -> Tensor:
        if self._flow_kernel is not None:
            with exact_float32:
                return self._flow_kernel.component(have)
        return self._run("flow", have)["next_partial"]

    def _temporal(self, frame: int = 0) -> None:
        """The Temporal ViT on the latest latent, told what `frame` of the step is; the ring moves
        on."""
        out = self._run("temporal", {**self._told[frame], **self._state})
        slot = self._in.tensors["slot"][frame]
        for name, ring in self._state.items():
            if name.startswith("cache_"):
                ring.index_copy_(0, slot, out[name.replace("cache_", "new_")][None])
        if "z_temporal" in out:
            self._work["z_temporal"].copy_(out["z_temporal"])

    def _histories(self, part: str) -> tuple[list[Tensor], list[Tensor]]:
        """The autoencoder's histories, and those before its latest frame."""
        before = [x for n, x in self._state.items() if n.startswith(f"{part}_before_")]
        return [self._state[f"{part}_{i}"] for i in range(len(before))], before

    def _autoencode(self, part: str, what: str, value: Tensor) -> Tensor:
        """Run the encoder or decoder; its histories move on."""
        now, before = self._histories(part)
        out = self._run(part, {what: value} | {f"state_{i}": x for i, x in enumerate(now)})
        for i, (history, old) in enumerate(zip(now, before, strict=True)):
            old.copy_(history)
            history.copy_(out[f"next_state_{i}"])
        return out["frames" if part == "decoder" else "latent"]

    def _decode(self, frame: int = 0) -> None:
        """The latest latent to pixels, those of `frame` of the step."""
        t = self._config.autoencoder.temporal_compression
        frames = self._autoencode("decoder", "latent", self._state["latent"])
        self._out.tensors["frames"][:, frame * t : (frame + 1) * t].copy_(frames)

    def _take(self) -> None:
        """What was drawn becomes the latest latent, frame by frame, and pixels."""
        c = self._config
        drawn = self._out.tensors["drawn"].view(self._batch, c.group, c.tokens, -1)
        for j in range(c.group):
            self._state["latent"].copy_(drawn[:, j])
            self._decode(j)
            if j + 1 < c.group:
                self._temporal(j + 1)

    def _frame(self, has_canvas: bool, which: Level) -> None:
        """One latent frame from the uploaded inputs into `_out`."""
        self._front(has_canvas)
        self._back(has_canvas, which)

    def _front(self, has_canvas: bool) -> None:
        """From the uploaded inputs to the canvas."""
        work, out = self._work, self._out.tensors
        self._temporal()
        if has_canvas:
            have = {**self._in.tensors, **self._levels[0].fixed, **work}
            guess = self._run("canvas", have | {"latent": self._state["latent"]})
            work["z_canvas"].copy_(guess["z_canvas"])
            out["staticness"].copy_(guess["staticness"])
            out["canvas"].copy_(guess["canvas"])
        elif self._config.canvas:  # masked in every branch
            work["z_canvas"].zero_()

    def _back(self, has_canvas: bool, which: Level) -> None:
        """From the canvas to the pixels."""
        x, out = self._in.tensors, self._out.tensors
        if which is None:
            out["drawn"].copy_(out["canvas"])
            self._take()
            return
        level = self._levels[which]
        have = {**x, **self._told[0], **level.fixed, **level.branches[has_canvas]}
        have |= {**self._work, **self._state}
        staticness = out["staticness"] if has_canvas else None
        gumbel = order_noise(x["order_noise"], len(level.steps))
        drawn = draw_order(staticness, gumbel, level.sampling, level.steps)
        order = torch.where(x["own_order"] > 0, drawn, x["order"])
        out["order"].copy_(order)
        if self._config.condition_attention == "isolated":
            have |= self._run("condition", have)
        partial = torch.zeros_like(out["drawn"])
        if self._config.residual:
            latent = self._state["latent"]
            partial = partial + (latent[:, None] if self._config.group > 1 else latent)
        for step in level.steps:
            have |= {f"{kind}_index": order[..., part] for kind, part in step.parts.items()}
            have["partial"] = partial
            have["z_tokens"] = self._spatial(step, have, level.first[has_canvas])
            if self._config.group > 1:  # to the flow head the frames of a group are rows
                rows = {n: have[n].flatten(0, 1) for n in ("select_index", "partial", "flow_noise")}
                rows["z_tokens"] = have["z_tokens"].flatten(1, 2)
                partial = self._flow({**have, **rows}).view_as(partial)
            else:
                partial = self._flow(have)
        out["drawn"].copy_(partial)
        self._take()

    # -- the program

    def _tell(self, time: int, action: Float32 | None) -> None:
        for j, host in enumerate(self._told_hosts):
            told = action if j == 0 else None
            self._in.host["slot"][j] = tell(host, self._config, time + j, self.since, told)

    @memory_told()
    def _do(self, *work: Callable[[], object], meanwhile: Callable[[], None] | None = None) -> None:
        """Run on the program's stream and wait; `meanwhile` is called in between, if the stream is
        one of a GPU."""
        require_process(self._process)
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for each in work:
                each()
        if meanwhile is not None and self._stream is not None:
            meanwhile()
        self._wait()

    def _wait(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()

    def advance(self, time: int, action: Float32 | None) -> None:
        self._tell(time, action)
        self._do(self._in.upload, self._temporal)

    def encode(self, frames: UInt8) -> None:
        self._given.host["frames"][:] = frames

        def run() -> None:
            latent = self._autoencode("encoder", "frames", self._given.tensors["frames"])
            self._state["latent"].copy_(latent)

        self._do(self._given.upload, run)

    def decode(self, *, again: bool = False) -> None:
        def rewind() -> None:
            for history, before in zip(*self._histories("decoder"), strict=True):
                history.copy_(before)

        self._do(*([rewind] if again else []), self._decode)

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
        """One captured graph, or two where the canvas is wanted in between."""
        has_canvas = self._config.canvas and bool(time > self.since.max())
        self._tell(time, action)
        self._in.host["own_order"].fill(float(order is None))
        if order is not None:
            self._in.host["order"][:] = order
        clock.lap("input")
        work = [self._in.upload]
        if has_canvas and on_canvas is not None:
            early = self._captured("_front", has_canvas)
            self._do(*work, early)
            clock.lap("canvas")
            self._do(self._canvas_to_pixels, self._canvas_frames.download)
            clock.lap("canvas_decoder")
            on_canvas(self._canvas_frames.host["frames"])
            clock.lap("on_canvas")
            which = level()
            work = [self._captured("_back", has_canvas, which)]
        else:
            which = level()
            work.append(self._captured("_frame", has_canvas, which))
        self._do(*work, self._out.download, meanwhile=meanwhile)
        clock.lap("frame")
        host = self._out.host
        if has_canvas:
            require_finite(self._name, "canvas", host["staticness"])
        require_finite(self._name, "flow", host["drawn"])
        return Drawn(
            frames=host["frames"],
            latent=host["drawn"],
            canvas=host["canvas"] if has_canvas else None,
            staticness=host["staticness"] if has_canvas else None,
            order=host["order"][..., :0] if which is None else host["order"],
        )

    def _canvas_to_pixels(self) -> None:
        c, t = self._config, self._config.autoencoder.temporal_compression
        now, _ = self._histories("decoder")
        canvas = self._out.tensors["canvas"].view(self._batch, c.group, c.tokens, -1)
        for j in range(c.group):
            states = {f"state_{i}": x for i, x in enumerate(now)}
            out = self._run("decoder", {"latent": canvas[:, j], **states})
            self._canvas_frames.tensors["frames"][:, j * t : (j + 1) * t].copy_(out["frames"])
            now = [out[f"next_state_{i}"] for i in range(len(now))]

    def _captured(self, part: str, *how: bool | Level) -> Callable[[], None]:
        """`_frame`, `_front` or `_back`, on CUDA as a graph."""
        work: Callable[..., None] = getattr(self, part)
        if not self._capture:
            return lambda: work(*how)
        if (part, *how) not in self._graphs:
            self._graphs[part, *how] = self._capture_graph(lambda: work(*how))
        replay: Callable[[], None] = self._graphs[part, *how].replay
        return replay

    @memory_told()
    def _capture_graph(self, work: Callable[[], None]) -> Any:
        graph = torch.cuda.CUDAGraph()
        # of a group, frames after the first leave z_temporal behind
        changed = [*self._state.values(), *self._work.values()]
        with torch.inference_mode(), capturing():
            with torch.cuda.stream(self._stream):
                kept = [tensor.clone() for tensor in changed]
                for _ in range(2):  # libraries choose and load their kernels
                    work()
            self._stream.synchronize()
            # what begins a capture waits for the current GPU
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
            ):
                work()
            with torch.cuda.stream(self._stream):
                for tensor, before in zip(changed, kept, strict=True):
                    tensor.copy_(before)
            self._stream.synchronize()
        return graph

    def latent(self) -> Float32:
        values: Float32 = _to_numpy(self._state["latent"])
        return values

    def set_latent(self, values: Float32) -> None:
        self.load({"latent": values})

    def snapshot(self) -> dict[str, Array]:
        self._wait()
        return {name: _to_numpy(tensor) for name, tensor in self._state.items()}

    def load(self, arrays: Mapping[str, Array], row: int | None = None) -> None:
        def run() -> None:
            for name, values in arrays.items():
                target = self._state[name]
                if row is not None:
                    target, values = target[row_index(name, row)], values[row_index(name, 0)]
                # PyTorch warns of what cannot be written to, as of a mapped file or from JAX
                given = torch.from_numpy(np.require(values, requirements=("C", "W")))
                if target.dtype == torch.bfloat16:
                    given = given.view(torch.bfloat16)
                target.copy_(given)

        self._do(run)

    def warmup(self) -> None:
        kept = self.snapshot()

        def run() -> None:
            for has_canvas in {False, self._config.canvas}:
                self._tell(int(has_canvas), None)
                self._in.upload()
                if has_canvas:
                    self._canvas_to_pixels()
                levels: list[Level] = list(range(len(self._levels)))
                for which in levels + ([None] if has_canvas else []):
                    self._captured("_frame", has_canvas, which)()
                    if has_canvas and self._capture:
                        self._captured("_front", has_canvas)()
                        self._captured("_back", has_canvas, which)()

        self._do(run)
        self.load(kept)


def _to_numpy(tensor: Tensor) -> Array:
    """A copy on the host; bfloat16 as its bits."""
    values = tensor.detach().to("cpu", copy=True).contiguous()
    if values.dtype == torch.bfloat16:
        bits: Array = values.view(torch.uint16).numpy()
        return bits
    array: Array = values.numpy()
    return array
