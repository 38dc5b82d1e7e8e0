"""What a latent frame costs at least: FLOPs and bytes by arithmetic, and the roofline of a machine.

FLOPs are those of matrix products, attention and convolutions, two for each multiply-add; norms,
softmax and all else that works element by element are left out. Bytes are the weights of those
products, once for every pass over them, and the inputs and outputs of every graph (KV cache, latent
frames, convolution histories): activations inside a graph count as never leaving the chip. Both
follow what the graphs of `canvasmar_rt.components` compute in a frame of a running rollout.

A component takes at least max(FLOPs / peak rate, bytes / bandwidth) seconds. That is a bound, and
where no such machine was at hand a prediction: what is printed says so.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from canvasmar_rt.benchmarks.dfot import STEPS, DfotConfig, dfot_for
from canvasmar_rt.bundle import Bundle, packaged_names
from canvasmar_rt.command import run_command
from canvasmar_rt.components import Component, components
from canvasmar_rt.config import (
    PRESETS,
    AutoencoderConfig,
    ModelConfig,
    SamplingConfig,
    from_dict,
    preset,
    to_dict,
)
from canvasmar_rt.errors import ConfigError, InputError
from canvasmar_rt.files import check_writable, write_file
from canvasmar_rt.schedule import ArStep, ar_steps, branch_inputs, first_step_branches, flow_plan

KIND = "predicted (roofline)"
DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
TIME_FEATURES = 256
"""Width of the sinusoidal features of a flow time or noise level."""


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs, bytes of weights read, bytes of inputs and outputs moved."""

    flops: int
    weight_bytes: int
    activation_bytes: int

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.weight_bytes + other.weight_bytes,
            self.activation_bytes + other.activation_bytes,
        )

    def times(self, count: int) -> Cost:
        """The cost of doing it so many times."""
        return Cost(self.flops * count, self.weight_bytes * count, self.activation_bytes * count)


class _Pass:
    """One pass through a network: its FLOPs and how many weights it reads."""

    def __init__(self) -> None:
        self.flops = 0
        self.weights = 0

    def linear(self, rows: int, inputs: int, outputs: int) -> None:
        if rows:
            self.flops += 2 * rows * inputs * outputs
            self.weights += inputs * outputs

    def conv(self, positions: int, inputs: int, outputs: int) -> None:
        """3x3."""
        self.linear(positions, 9 * inputs, outputs)

    def block(
        self,
        rows: int,
        dim: int,
        streams: Sequence[int],
        keys: int,
        chosen: Sequence[int] | None = None,
    ) -> None:
        """A transformer block. `streams` are the tokens served by each set of weights, `chosen`
        those of them whose output is wanted (None: all), `keys` what every token attends to."""
        chosen = streams if chosen is None else chosen
        for tokens in streams:
            self.linear(rows * tokens, dim, 3 * dim)
        self.flops += 4 * rows * sum(chosen) * keys * dim
        for tokens in chosen:
            self.linear(rows * tokens, dim, dim)
            self.linear(rows * tokens, dim, 4 * dim)
            self.linear(rows * tokens, 4 * dim, dim)


def _cost(passes: Sequence[_Pass], activations: int, dtype_bytes: int, on_chip: int) -> Cost:
    largest, *others = sorted((p.weights * dtype_bytes for p in passes), reverse=True)
    read = largest + sum(max(0, size - on_chip) for size in others)  # what fits may stay
    return Cost(sum(p.flops for p in passes), read, activations)


def _moved(component: Component, sizes: Mapping[str, int], dtype_bytes: int) -> int:
    """Bytes of a graph's inputs and outputs."""
    widths = {"float32": 4, "hidden": dtype_bytes, "int64": 8, "uint8": 1}
    return sum(
        widths[t.dtype] * math.prod(sizes[d] if isinstance(d, str) else d for d in t.dims)
        for t in (*component.inputs, *component.outputs)
    )


def frame_costs(
    config: ModelConfig,
    sampling: SamplingConfig,
    *,
    batch: int = 1,
    dtype_bytes: int = 4,
    on_chip: int = 0,
) -> dict[str, Cost]:
    """Costs of one latent frame, or group of them, by component, in the order in which they run;
    `spatial` and `flow` over all AR steps.

    Args:
        dtype_bytes: of a weight and a hidden activation.
        on_chip: bytes of cache. Of weights that are read again and again what fits into it is read
            once a frame.

    Raises:
        ConfigError: if there are more AR steps than tokens.
    """
    inputs = branch_inputs(sampling, has_canvas=config.canvas)
    branches = len(inputs["branch_weight"])
    evaluations = len(flow_plan(sampling).time)
    steps = ar_steps(config.tokens, sampling.ar_steps)
    table = components(config)
    first = first_step_branches(inputs, table)
    each = batch * config.group  # frames that are drawn
    sizes = {"B": batch, "G": branches, "E": evaluations, "R": each}

    def cost(passes: Sequence[_Pass], moved: int) -> Cost:
        return _cost(passes, moved, dtype_bytes, on_chip)

    def graph(name: str, work: _Pass, times: int = 1) -> Cost:
        return cost([work] * times, times * _moved(table[name], sizes, dtype_bytes))

    costs = {"temporal": graph("temporal", _temporal(config, batch), config.group)}
    if config.canvas:
        costs["canvas"] = graph("canvas", _canvas(config, batch))
    if "condition" in table:
        work = graph("condition", _condition(config, batch))
        again_read = max(0, work.weight_bytes - on_chip)  # by the Spatial MAR: it is its blocks
        costs["condition"] = dataclasses.replace(work, weight_bytes=again_read)
    passes, moved = [], 0
    for step in steps:
        name, rows = ("spatial", branches) if step.known else ("spatial_first", first)
        passes.append(
            _drawing(config, batch, rows, step)
            if config.family == "unified"
            else _spatial(config, rows * each, step)
        )
        at = sizes | {"G": rows, "K": step.known, "S": step.drawn, "M": step.left}
        moved += _moved(table[name], at, dtype_bytes) if rows else 0
        if rows < branches:
            moved += _moved(table["unconditional"], at, dtype_bytes)
    costs["spatial"] = cost(passes, moved)
    prepare = [_flow_prepare(config, branches * each * s.drawn, evaluations) for s in steps]
    evaluate = [_flow_evaluation(config, each * s.drawn, branches) for s in steps]
    costs["flow"] = cost(prepare, 0) + cost(
        evaluate * evaluations,
        sum(_moved(table["flow"], sizes | {"S": step.drawn}, dtype_bytes) for step in steps),
    )
    decoder = _autoencoder(config.autoencoder, batch, decoder=True)
    return costs | {"decoder": graph("decoder", decoder, config.group)}


def encoder_cost(config: ModelConfig, *, batch: int = 1, dtype_bytes: int = 4) -> Cost:
    """What encoding t observed pixel frames costs."""
    work = _autoencoder(config.autoencoder, batch, decoder=False)
    moved = _moved(components(config)["encoder"], {"B": batch}, dtype_bytes)
    return _cost([work], moved, dtype_bytes, 0)


def dfot_cost(
    config: DfotConfig, *, steps: int = STEPS, passes: int = 1, batch: int = 1, dtype_bytes: int = 4
) -> Cost:
    """What denoising one chunk with DFoT costs, decoding left out. `passes` is 1 for conditional
    sampling, 2 for vanilla history guidance, whose passes go through the network as one batch."""
    rows, dim = batch * passes, config.width
    tokens = config.frames * math.prod(config.grid)
    modulated = rows * (config.frames if config.modulation == "frame" else tokens)
    work = _Pass()
    work.linear(rows * tokens, config.channels, dim)
    work.linear(rows * config.frames, TIME_FEATURES, dim)
    work.linear(rows * config.frames, dim, dim)
    for _ in range(config.layers):
        work.linear(modulated, dim, 6 * dim)
        work.block(rows, dim, [tokens], tokens)
    work.linear(modulated, dim, 2 * dim)
    work.linear(rows * tokens, dim, config.channels)
    moved = (1 + passes) * batch * tokens * config.channels * 4  # x in and out, noise for a pass
    return Cost(work.flops, work.weights * dtype_bytes, moved).times(steps)


def _temporal(config: ModelConfig, batch: int) -> _Pass:
    work, tokens = _Pass(), config.temporal_tokens
    patch = config.autoencoder.latent_channels * config.temporal_patch**2
    work.linear(batch * tokens, patch, config.dim)
    if config.action_dim:
        work.linear(batch, config.action_dim, config.dim)
    keys = (config.context_frames + 1) * tokens  # the ring, and this frame
    for layer in range(config.temporal_layers):
        last = layer == config.temporal_layers - 1
        # of a unified model's last layer only keys and values are wanted
        unwanted = [0] if last and config.family == "unified" else None
        work.block(batch, config.dim, [tokens], keys, unwanted)
    return work


def _drawing(config: ModelConfig, batch: int, branches: int, step: ArStep) -> _Pass:
    """A unified model's pass over the frame being drawn."""
    work, tokens = _Pass(), config.tokens
    work.linear(batch * step.known, config.autoencoder.latent_channels, config.dim)
    for layer in range(config.temporal_layers):
        last = layer == config.temporal_layers - 1
        chosen = [step.drawn] if last else None
        keys = (config.context_frames + 1) * tokens
        work.block(branches * batch, config.dim, [tokens], keys, chosen)
    return work


def _canvas(config: ModelConfig, batch: int) -> _Pass:
    work, channels = _Pass(), config.autoencoder.latent_channels
    tokens = config.temporal_tokens + config.tokens
    work.linear(batch * config.tokens, channels, config.dim)
    for _ in range(config.canvas_layers):
        work.block(batch, config.dim, [tokens], tokens)
        if config.canvas_conv:
            work.conv(batch * config.tokens, config.dim, config.canvas_conv)
            work.conv(batch * config.tokens, config.canvas_conv, config.dim)
    for _ in range(
        2 * config.group if config.group > 1 else 0
    ):  # the two layers of each frame's head
        work.linear(batch * config.tokens, config.dim, config.dim)
    work.linear(batch * config.group * config.tokens, config.dim, channels + 1)
    return work


def _condition(config: ModelConfig, rows: int) -> _Pass:
    work = _Pass()
    for _ in range(config.spatial_layers):
        work.block(rows, config.dim, [config.temporal_tokens], config.temporal_tokens)
    return work


def _spatial(config: ModelConfig, rows: int, step: ArStep) -> _Pass:
    work, conditions = _Pass(), config.temporal_tokens
    own = 0 if config.condition_attention == "isolated" else conditions
    work.linear(rows * step.known, config.autoencoder.latent_channels, config.dim)
    for layer in range(config.spatial_layers):
        masked = 0 if layer < config.encoder_layers else step.left
        streams = [own + masked, step.known]
        if config.norm != "mmdit":
            streams = [sum(streams)]
        last = layer == config.spatial_layers - 1
        keys = conditions + masked + step.known
        work.block(rows, config.dim, streams, keys, [step.drawn] if last else None)
        if layer in config.group_layers:
            work.linear(rows * config.tokens, config.dim, 3 * config.dim)
            work.flops += 4 * rows * config.tokens * config.group * config.dim
            work.linear(rows * config.tokens, config.dim, config.dim)
    return work


def _flow_prepare(config: ModelConfig, rows: int, evaluations: int) -> _Pass:
    """What an AR step does once: conditions and times."""
    work, width = _Pass(), config.flow.width
    modulations = width * config.flow.modulations
    work.linear(rows, config.dim, width)
    work.linear(evaluations, TIME_FEATURES, width)
    work.linear(evaluations, width, width)
    if config.flow.modulation == "additive":
        work.linear(rows, width, modulations)
        work.linear(evaluations, width, modulations)
    return work


def _flow_evaluation(config: ModelConfig, tokens: int, branches: int) -> _Pass:
    work, width = _Pass(), config.flow.width
    channels, rows = config.autoencoder.latent_channels, tokens * branches
    work.linear(tokens, channels, width)  # the branches share the noisy token
    if config.flow.modulation == "joint":
        work.linear(rows, width, width * config.flow.modulations)
    for _ in range(2 * config.flow.blocks):
        work.linear(rows, width, width)
    work.linear(rows, width, channels)
    return work


def _autoencoder(config: AutoencoderConfig, batch: int, *, decoder: bool) -> _Pass:
    work, widths, kernel = _Pass(), config.widths, config.kernel(decoder=decoder)
    pixels = config.height * config.width // config.patch**2
    positions = [batch * pixels // 4**i for i in range(len(widths))]
    patch = 3 * config.temporal_compression * config.patch**2
    if decoder:
        work.conv(positions[-1], kernel * config.latent_channels, widths[-1])
        work.conv(positions[0], widths[0], patch)
    else:
        work.conv(positions[0], kernel * patch, widths[0])
        work.conv(positions[-1], widths[-1], 2 * config.latent_channels)
    for i, width in enumerate(widths):
        for _ in range(config.blocks):
            work.conv(positions[i], kernel * width, width)
            work.conv(positions[i], width, width)
        if i and decoder:
            work.conv(positions[i], width, 4 * widths[i - 1])
        elif i:
            work.conv(positions[i], widths[i - 1], width)
    return work


# -- machines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Machine:
    """Dense peak rates in FLOP/s by dtype, memory bandwidth in bytes/s, bytes of the largest
    cache."""

    name: str
    peak: Mapping[str, float]
    bandwidth: float
    on_chip: int

    def rate(self, dtype: str) -> float:
        """Peak FLOP/s.

        Raises:
            ConfigError: if it is not known in this dtype.
        """
        if dtype not in self.peak:
            raise ConfigError(
                f"{self.name}: no peak rate for --dtype {dtype}; there is {', '.join(self.peak)}"
            )
        return self.peak[dtype]

    def seconds(self, cost: Cost, dtype: str) -> tuple[float, str]:
        """Least time of a cost, and what binds: "compute" or "memory"."""
        compute = cost.flops / self.rate(dtype)
        memory = (cost.weight_bytes + cost.activation_bytes) / self.bandwidth
        return max(compute, memory), "compute" if compute >= memory else "memory"


def _gpu(name: str, fp32: float, half: float, int8: float, bandwidth: float, l2: int) -> Machine:
    """Rates in TFLOP/s (TOP/s), bandwidth in GB/s, L2 in MiB."""
    rates = {"fp32": fp32, "bf16": half, "fp16": half, "int8": int8}
    return Machine(
        name=name,
        peak={dtype: rate * 1e12 for dtype, rate in rates.items()},
        bandwidth=bandwidth * 1e9,
        on_chip=l2 << 20,
    )


GPUS = {
    "h200": _gpu("NVIDIA H200 SXM", 67, 989, 1979, 4800, 50),
    "h100": _gpu("NVIDIA H100 SXM", 67, 989, 1979, 3350, 50),
    "a100": _gpu("NVIDIA A100 SXM 80GB", 19.5, 312, 624, 2039, 40),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", 82.6, 165.2, 660.6, 1008, 72),
    "orin": _gpu("NVIDIA Jetson AGX Orin 64GB", 5.3, 42.5, 85, 204.8, 4),
}
"""Published by the vendor, without sparsity; float32 without TF32, halves with float32
accumulation. Sources are in docs/limit.md."""

HERE = "here"


def here() -> Machine:
    """This machine's CPU as measured now, in a second or two: NumPy's float32 matrix product and
    copies of 256 MB, the best of several. Other work on it makes both look slower."""
    a, b, out = (np.ones((1024, 1024), np.float32) for _ in range(3))
    source, target = np.ones(1 << 26, np.float32), np.zeros(1 << 26, np.float32)
    multiply = min(_timed(lambda: np.matmul(a, b, out=out)) for _ in range(10))
    copy = min(_timed(lambda: np.copyto(target, source)) for _ in range(5))
    return Machine(
        name="this CPU",
        peak={"fp32": 2 * 1024**3 / multiply},
        bandwidth=2 * source.nbytes / copy,
        on_chip=_cache_bytes(),
    )


def _timed(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def _cache_bytes() -> int:
    """Bytes of the CPU's largest cache; 0 where Linux does not say."""
    found = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K") and text[:-1].isdigit():
            found.append(int(text[:-1]) << 10)
    return max(found)


# -- predictions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Baseline:
    """A DFoT that predicts `predicted` of the latent frames of its chunk."""

    config: DfotConfig
    predicted: int


def predict(
    config: ModelConfig,
    sampling: SamplingConfig,
    machine: Machine,
    *,
    dtype: str,
    batch: int,
    baseline: Baseline | None = None,
) -> dict[str, Any]:
    """Costs and roofline times of a latent frame, or of a group where the model draws
    `latent_frames` at once, JSON-ready; times are in `predicted_ms`.

    With a baseline `dfot` says how much more work, and how much more time on this machine, it needs
    until the first frame and until the last frame of a clip are decoded: a bound of the ratio of
    two systems that reach their rooflines equally well.

    Raises:
        ConfigError: if the machine's rate is not known in this dtype.
    """
    bytes_ = DTYPE_BYTES[dtype]
    costs = frame_costs(config, sampling, batch=batch, dtype_bytes=bytes_, on_chip=machine.on_chip)
    frame_seconds = sum(machine.seconds(cost, dtype)[0] for cost in costs.values())
    report: dict[str, Any] = {
        "kind": KIND,
        "machine": machine.name,
        "dtype": dtype,
        "batch": batch,
        "latent_frames": config.group,
        "components": {name: _row(cost, machine, dtype) for name, cost in costs.items()},
        "frame": {
            "flops": sum(cost.flops for cost in costs.values()),
            "weight_bytes": sum(cost.weight_bytes for cost in costs.values()),
            "activation_bytes": sum(cost.activation_bytes for cost in costs.values()),
            "predicted_ms": _ms(frame_seconds),
        },
        "observe": _row(encoder_cost(config, batch=batch, dtype_bytes=bytes_), machine, dtype),
    }
    if baseline is not None:
        report["dfot"] = {
            name: _against(baseline, passes, costs, machine, dtype, batch, config.group)
            for name, passes in (("conditional", 1), ("vanilla", 2))
        }
    return report


def _row(cost: Cost, machine: Machine, dtype: str) -> dict[str, Any]:
    seconds, bound = machine.seconds(cost, dtype)
    return {**dataclasses.asdict(cost), "predicted_ms": _ms(seconds), "bound_by": bound}


def _ms(seconds: float) -> float:
    return float(f"{1e3 * seconds:.4g}")


def _against(
    baseline: Baseline,
    passes: int,
    costs: Mapping[str, Cost],
    machine: Machine,
    dtype: str,
    batch: int,
    group: int,
) -> dict[str, Any]:
    chunk = dfot_cost(baseline.config, passes=passes, batch=batch, dtype_bytes=DTYPE_BYTES[dtype])
    frames = baseline.predicted

    def ratios(chunk: float, decoder: float, drawn: float) -> dict[str, float]:
        """`decoder` and `drawn` are of a group."""
        decoder, draws = decoder / group, math.ceil(frames / group)
        return {
            "first_frame": round((chunk + decoder) / drawn, 2),
            "clip": round((chunk + frames * decoder) / (draws * drawn), 2),
        }

    seconds = {name: machine.seconds(cost, dtype)[0] for name, cost in costs.items()}
    chunk_seconds = machine.seconds(chunk, dtype)[0]
    return {
        "chunk": _row(chunk, machine, dtype),
        "clip_frames": frames,
        "work_over_ours": ratios(
            chunk.flops, costs["decoder"].flops, sum(cost.flops for cost in costs.values())
        ),
        "predicted_time_over_ours": ratios(
            chunk_seconds, seconds["decoder"], sum(seconds.values())
        ),
    }


@dataclasses.dataclass(frozen=True)
class Measured:
    """What `canvasmar-rt bench` found: medians of a latent frame in ms by batch size, and how the
    model was sampled, in which dtype (a name of `DTYPE_BYTES`), and on which device."""

    frame_ms: Mapping[int, float]
    sampling: SamplingConfig
    dtype: str
    device: str


def measured(report: Mapping[str, Any], config: ModelConfig) -> Measured:
    """A report of `canvasmar-rt bench` on the same model.

    Raises:
        InputError: if it is no such report, or of another model.
    """
    try:
        model, ours = report["config"]["model"], report["config"]["contestants"]["ours"]
        int8 = ours["quantization"] == "int8"
        dtypes = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
        found = Measured(
            {m["batch"]: m["contestants"]["ours"]["frame_ms"]["p50"] for m in report["metrics"]},
            from_dict(SamplingConfig, ours["sampling"], "sampling"),
            "int8" if int8 else dtypes[ours["arithmetic"]],
            ours["device"],
        )
        for batch, ms in found.frame_ms.items():
            if type(batch) is not int or type(ms) not in (int, float) or not 0 < ms < math.inf:
                raise TypeError
    except (KeyError, TypeError, ConfigError):
        raise InputError(
            "--measured: not a report that `canvasmar-rt bench --json` wrote"
        ) from None
    if model != config.name:
        raise InputError(f"--measured: a report of {model}, and this is {config.name}")
    return found


# -- the command


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
stdout = Console(emoji=False)


@app.command()
def main(
    source: Annotated[
        str, typer.Argument(help="A preset, a bundle, or a packaged name.", metavar="MODEL")
    ],
    machine: Annotated[
        str, typer.Option(help=f"Comma-separated: {', '.join((*GPUS, HERE))} (measures this CPU).")
    ] = "h200",
    dtype: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(DTYPE_BYTES)}; by default fp32, or what was measured."),
    ] = None,
    batch: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1",
    guidance: Annotated[bool, typer.Option(help="The model's guidance, or one branch.")] = True,
    dfot: Annotated[
        bool, typer.Option("--dfot", help="Compare with a DFoT in proportion.")
    ] = False,
    context: Annotated[int, typer.Option(min=1, help="Context latent frames of DFoT's chunk.")] = 2,
    measured_: Annotated[
        Path | None,
        typer.Option(
            "--measured",
            help="JSON of `canvasmar-rt bench`: fraction reached, sampled as was measured.",
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON to write.")] = None,
) -> None:
    """FLOPs, bytes and least time of a latent frame. All times are predicted, not measured."""
    config, sampling = _model(source)
    names = machine.split(",")
    unknown = [name for name in names if name not in (*GPUS, HERE)]
    if unknown:
        raise ConfigError(f"--machine {unknown[0]}: not one of {', '.join((*GPUS, HERE))}")
    reached = None
    if measured_ is not None:
        if len(names) > 1:
            raise ConfigError(
                "--measured: a measurement belongs to one machine; give one --machine"
            )
        reached = measured(_json(measured_), config)
        if (reached.device == "cpu") != (names == [HERE]):
            raise InputError(
                f"--measured {measured_}: of device {reached.device!r}; give the --machine it was "
                f"measured on, for a CPU {HERE!r} on that machine"
            )
        if dtype not in (None, reached.dtype) or not guidance:
            raise ConfigError(
                f"--measured {measured_}: leave out --dtype and --no-guidance: it was measured "
                f"in {reached.dtype}, as the report says"
            )
        sampling, dtype = reached.sampling, reached.dtype
        if reached.device == "cpu" and dtype != "fp32":
            raise InputError(
                f"--measured {measured_}: measured in {dtype} on a CPU, whose peak rate is known "
                "here in float32 only; give a report of a float32 bundle"
            )
    if not guidance:
        sampling = dataclasses.replace(sampling, temporal_guidance=1.0, canvas_guidance=1.0)
    dtype = "fp32" if dtype is None else dtype
    if dtype not in DTYPE_BYTES:
        raise ConfigError(f"--dtype must be one of {', '.join(DTYPE_BYTES)}, got {dtype!r}")
    batches = _batches(batch)
    if output is not None:
        check_writable(output)
    baseline = _baseline(config, context) if dfot else None
    machines = [here() if name == HERE else GPUS[name] for name in names]
    predictions = []
    for place in machines:
        for size in batches:
            prediction = predict(
                config, sampling, place, dtype=dtype, batch=size, baseline=baseline
            )
            if reached is not None:
                if size not in reached.frame_ms:
                    raise InputError(
                        f"--measured {measured_}: nothing for batch {size}, only for "
                        f"{', '.join(map(str, reached.frame_ms))}"
                    )
                limit, ms = prediction["frame"]["predicted_ms"], reached.frame_ms[size]
                prediction["measured_ms"] = ms
                prediction["fraction_of_roofline"] = float(f"{limit / (ms * config.group):.4g}")
            predictions.append(prediction)
            _print(config.name, prediction)
    if output is not None:
        report = {
            "model": config.name,
            "kind": KIND,
            "sampling": to_dict(sampling),
            "machines": [dataclasses.asdict(place) for place in machines],
            "predictions": predictions,
        }
        write_file(output, json.dumps(report, indent=1) + "\n")


def _model(source: str) -> tuple[ModelConfig, SamplingConfig]:
    """As `canvasmar-rt info` reads it: a name that is both is the packaged bundle."""
    if source in PRESETS and source not in packaged_names() and not Path(source).is_dir():
        return preset(source)
    manifest = Bundle.open(source).manifest
    return manifest.model, manifest.sampling


def _batches(text: str) -> list[int]:
    try:
        batches = [int(b) for b in text.split(",")]
    except ValueError:
        batches = [0]
    if min(batches) < 1:
        raise ConfigError(f"--batch takes numbers such as 1,8,32; got {text!r}")
    return batches


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"--measured {path}: cannot be read ({error})") from None


def _baseline(config: ModelConfig, context: int) -> Baseline:
    chosen = dfot_for(config)
    if context >= chosen.frames:
        raise ConfigError(f"--context {context} leaves none of DFoT's {chosen.frames} frames")
    return Baseline(config=chosen, predicted=chosen.frames - context)


def _print(name: str, prediction: Mapping[str, Any]) -> None:
    table = Table(
        title=f"{escape(name)} on {prediction['machine']}, {prediction['dtype']}, "
        f"batch {prediction['batch']}: {KIND}",
        box=SIMPLE_HEAD,
    )
    table.add_column("component", no_wrap=True)
    for column in ("GFLOP", "MB of\nweights", "MB in\nand out", "ms, predicted\n(roofline)"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("bound by")

    def add(label: str, row: Mapping[str, Any]) -> None:
        table.add_row(
            label, f"{row['flops'] / 1e9:.2f}", f"{row['weight_bytes'] / 1e6:.1f}",
            f"{row['activation_bytes'] / 1e6:.1f}", f"{row['predicted_ms']:.4g}",
            row.get("bound_by", ""),
        )  # fmt: skip

    for component, row in prediction["components"].items():
        add(component, row)
    table.add_section()
    count = prediction["latent_frames"]
    add("a latent frame" if count == 1 else f"{count} latent frames", prediction["frame"])
    table.add_section()
    add("encoder (observe)", prediction["observe"])
    stdout.print(table)
    for kind, row in prediction.get("dfot", {}).items():
        work, times = row["work_over_ours"], row["predicted_time_over_ours"]
        stdout.print(
            f"DFoT, {kind}: {row['chunk']['flops'] / 1e12:.4g} TFLOP a chunk; times our work: "
            f"{work['first_frame']} to the first frame, {work['clip']} for a clip of "
            f"{row['clip_frames']}; times our time, {KIND}: {times['first_frame']} and "
            f"{times['clip']}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if "measured_ms" in prediction:
        stdout.print(
            f"measured: {prediction['measured_ms']} ms a latent frame, "
            f"{prediction['fraction_of_roofline']:.1%} "
            f"of the limit, {KIND}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip


if __name__ == "__main__":
    run_command(app)
