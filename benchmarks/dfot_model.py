"""DFoT's network, one DDIM update of it, its ONNX export, and a runner in PyTorch.

Letters as in `canvasmar_rt.config`, with T the latent frames of the chunk, R rows (batch times
guidance passes), L = T*N tokens. Architecture: the public DiT3D (Song et al. 2025; DiT, Peebles and
Xie 2023). Norms, rotary angles, softmax and the update run in float32 whatever the weights' dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from canvasmar_rt.benchmarks.dfot import (
    DfotConfig,
    Guidance,
    Schedule,
    shapes_of,
    step_component,
)
from canvasmar_rt.engines.memory import Array, capturing
from canvasmar_rt.engines.program import Float32, UInt8
from canvasmar_rt.engines.torch_engine import TorchEngine, compiled
from canvasmar_rt.engines.torch_program import Parcel, exact_float32
from canvasmar_rt.export.exporter import to_onnx
from canvasmar_rt.export.quantize import quantize_products
from canvasmar_rt.models.layers import (
    Attention,
    attention,
    init_weights,
    rotation_tables,
    split_qkv,
)

LEVEL_CHANNELS = 256
"""Width of the sinusoidal embedding of a noise level."""

LONGEST_PERIOD = 10000.0
"""Of the sinusoids of noise levels, and base of the rotary frequencies."""


def rotary_tables(config: DfotConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines (L, Dh/2) of all tokens of a chunk: a third of a head's channel pairs
    rotates with the frame, a third with the row, a third with the column, rows and columns having
    equally many where they are not divisible by three."""
    pairs = config.width // config.heads // 2
    space = (pairs + 1) // 3
    positions = torch.meshgrid(
        *(torch.arange(n) for n in (config.frames, *config.grid)), indexing="ij"
    )
    angles = [
        position.flatten()[:, None] * LONGEST_PERIOD ** (-torch.arange(count) / count)
        for position, count in zip(positions, (pairs - 2 * space, space, space), strict=True)
    ]
    angle = torch.cat(angles, dim=-1)
    return angle.cos(), angle.sin()


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without weights, then scale and shift."""
    normed = F.layer_norm(x, x.shape[-1:], eps=1e-6)  # in float32 inside, whatever the dtype
    return normed * (1 + scale) + shift


class Block(nn.Module):
    """Attention and a perceptron, each modulated and gated by the noise level (adaLN-zero)."""

    def __init__(self, config: DfotConfig) -> None:
        super().__init__()
        dim, self.heads = config.width, config.heads
        self.attention = Attention(dim)
        self.mlp = nn.Sequential(
            nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim)
        )
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, condition: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """x (R, T, N, D), condition (R, T, 1 or N, D) -> (R, T, N, D)."""
        frames = x.shape[1]
        parts = self.modulation(condition).chunk(6, dim=-1)
        shift, scale, gate = parts[:3]
        h = modulated(x, shift, scale).flatten(1, 2)  # (R, L, D)
        q, k, v = split_qkv(self.attention.qkv(h), tables, self.heads)
        h = self.attention.out(attention(q, k, v, self.heads))
        x = x + gate * h.unflatten(1, (frames, -1))
        shift, scale, gate = parts[3:]
        out: Tensor = x + gate * self.mlp(modulated(x, shift, scale))
        return out


class Dfot(nn.Module):
    """The velocity v of every frame of a chunk, each frame having its own noise level."""

    cos: Tensor
    sin: Tensor
    frequencies: Tensor

    def __init__(self, config: DfotConfig) -> None:
        super().__init__()
        self.config = config
        dim = config.width
        self.embed = nn.Linear(config.channels, dim)
        self.level = nn.Sequential(nn.Linear(LEVEL_CHANNELS, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.modulation = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, config.channels)
        half = LEVEL_CHANNELS // 2
        cos, sin = rotation_tables(*rotary_tables(config))
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        frequencies = LONGEST_PERIOD ** (-torch.arange(half) / half)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, x: Tensor, levels: Tensor) -> Tensor:
        """x (R, T, N, C) float32 and noise levels (R, T) float32 -> v (R, T, N, C) float32."""
        dtype = self.embed.weight.dtype
        angle = levels[..., None] * self.frequencies
        sinusoids = torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)
        condition = F.silu(self.level(sinusoids))[:, :, None]
        if self.config.modulation == "token":
            condition = condition.expand(-1, -1, x.shape[2], -1)
        h = self.embed(x.to(dtype))
        for block in self.blocks:
            h = block(h, condition, (self.cos, self.sin))
        shift, scale = self.modulation(condition).chunk(2, dim=-1)
        v: Tensor = self.out(modulated(h, shift, scale)).float()
        return v


class DfotStep(nn.Module):
    """One DDIM update of a whole chunk (`canvasmar_rt.benchmarks.dfot.step_component`)."""

    def __init__(self, network: nn.Module) -> None:
        """`network`: x (R, T, N, C) and noise levels (R, T) -> v, as `Dfot`."""
        super().__init__()
        self.network = network

    def forward(
        self,
        x: Tensor,
        step: Tensor,
        levels: Tensor,
        weights: Tensor,
        keep: Tensor,
        move: Tensor,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x (B, T, N, C), step (1,) int64 and the schedule's arrays -> the next x and step. With
        `noise` (B, T, N, C) there are two passes as one batch, the second with it in place of the
        history: the frames that do not move."""
        now, keep, move = (t.index_select(0, step)[0] for t in (levels, keep, move))
        keep, move = keep[:, None, None], move[:, None, None]
        passes = [x] if noise is None else [x, torch.where(move == 0, noise, x)]
        rows = now[:, None].expand(-1, x.shape[0], -1).flatten(0, 1)
        v = self.network(torch.cat(passes), rows).unflatten(0, (len(passes), -1))
        guided = (v * weights[:, None, None, None, None]).sum(0)
        return keep * x + move * guided, step + 1


def build_dfot(config: DfotConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Dfot:
    """An untrained network with seeded weights of `dtype`, in evaluation mode. What adaLN-zero
    starts at zero is small instead, so that no part of the network vanishes."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Dfot(config)
        network.apply(init_weights)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(False)
        if "modulation.weight" in name:
            parameter.mul_(0.1)
        parameter.data = parameter.data.to(dtype)  # the tables stay in float32
    return network.eval()


@functools.cache
def parameters(config: DfotConfig) -> int:
    """Parameters of the network, counted without making the weights."""
    with torch.device("meta"):
        return sum(p.numel() for p in Dfot(config).parameters())


@functools.cache
def evaluation_flops(config: DfotConfig) -> int:
    """Floating-point operations of one evaluation of one chunk in one pass, counted by PyTorch."""
    with torch.device("meta"):
        network = Dfot(config)
        tokens = config.grid[0] * config.grid[1]
        x = torch.empty(1, config.frames, tokens, config.channels)
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            network(x, torch.empty(1, config.frames))
    return int(counter.get_total_flops())


def export_dfot(
    network: Dfot, guidance: Guidance, path: Path, *, opset: int = 20, int8: bool = False
) -> None:
    """Write `DfotStep` as one ONNX graph, of any batch size and number of steps, with matrix
    products in `int8` if a bundle's are. The weights are external data beside it, since XL's are
    over the 2 GB an ONNX file can hold."""
    component = step_component(network.config, guidance)
    sizes = {"B": 3, "S": 7}
    examples, dynamic = [], []
    for tensor in component.inputs:
        shape = [sizes[d] if isinstance(d, str) else d for d in tensor.dims]
        examples.append(torch.zeros(shape, dtype=getattr(torch, tensor.dtype)))
        dynamic.append({i: d for i, d in enumerate(tensor.dims) if isinstance(d, str)})
    proto = to_onnx(
        DfotStep(network).eval(),
        tuple(examples),
        tuple(dynamic),
        [tensor.name for tensor in component.inputs],
        [tensor.name for tensor in component.outputs],
        opset,
    )
    if int8:
        proto = quantize_products(proto)
    onnx.save_model(proto, path, save_as_external_data=True, location=f"{path.name}.data")


class TorchRunner:
    """See `canvasmar_rt.benchmarks.dfot.Runner`: PyTorch over fixed tensors, compiled if the engine
    compiles. On CUDA one update and one decoding are captured and replayed, if the engine does."""

    def __init__(
        self, engine: TorchEngine, network: Dfot, guidance: Guidance, plan: Schedule, batch: int
    ) -> None:
        device = torch.device(engine.device)
        self._step = DfotStep(network.to(device))
        if engine._compile:
            compiled(self._step)
        self._decoder = engine.component("decoder")
        self._steps = len(plan.keep)
        self._stream = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        component = step_component(network.config, guidance)
        fixed = {k: torch.from_numpy(v).to(device) for k, v in plan.inputs().items()}
        given = shapes_of([t for t in component.inputs if t.name not in fixed], batch)
        self._in = Parcel(given, device)
        have = {**self._in.tensors, **fixed}
        self._inputs = [have[tensor.name] for tensor in component.inputs]
        self.x, self.noise = self._in.host["x"], self._in.host.get("noise")
        entry = engine.bundle.manifest.components["decoder"]
        states = shapes_of(entry.inputs, batch)
        self._latent = Parcel({"latent": states.pop("latent")}, device)
        self._frames = Parcel({"frames": shapes_of(entry.outputs, batch)["frames"]}, device)
        self._states = [
            torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
            for shape, dtype in states.values()
        ]
        capture = engine._cuda_graph and self._stream is not None
        self._update, self._decode = (
            self._captured(work) if capture else work for work in (self._one_step, self._one_frame)
        )

    def _one_step(self) -> None:
        made = self._step(*self._inputs)
        for name, value in zip(("x", "step"), made, strict=True):
            self._in.tensors[name].copy_(value)

    def _one_frame(self) -> None:
        with exact_float32:  # as in a rollout
            frames, *after = self._decoder(self._latent.tensors["latent"], *self._states)
        self._frames.tensors["frames"].copy_(frames)
        for state, value in zip(self._states, after, strict=True):
            state.copy_(value)

    def _captured(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        for _ in range(2):  # libraries choose and load their kernels
            self._do(self._in.upload, work)  # from step 0 each time
        with (
            torch.inference_mode(),
            capturing(),
            torch.cuda.device(self._latent.tensors["latent"].device),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            work()
        replay: Callable[[], None] = graph.replay
        return replay

    def _do(self, *work: Callable[[], object]) -> None:
        """Run on the runner's stream and wait."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            for each in work:
                each()
        if self._stream is not None:
            self._stream.synchronize()

    def warmup(self) -> None:
        self._do(self._in.upload, self._update, self._decode)

    def denoise(self) -> Float32:
        self._in.host["step"][...] = 0  # on the CPU it is the tensor that counts
        self._do(self._in.upload, *[self._update] * self._steps, self._in.download)
        return self.x

    def rewind(self, states: Sequence[Array]) -> None:
        def load() -> None:
            for state, values in zip(self._states, states, strict=True):
                given = torch.from_numpy(values)
                state.copy_(given.view(torch.bfloat16) if state.dtype == torch.bfloat16 else given)

        self._do(load)

    def decode(self, latent: Float32) -> UInt8:
        self._latent.host["latent"][...] = latent
        self._do(self._latent.upload, self._decode, self._frames.download)
        return self._frames.host["frames"]
