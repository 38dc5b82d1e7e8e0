"""From a model to a bundle: trace the components, compose, write, measure parity, publish."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import logging
import math
import os
import secrets
import shutil
import tempfile
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import onnx
import torch
from onnx import ModelProto, TensorProto
from onnx.external_data_helper import set_external_data
from onnx.helper import make_node
from onnxscript import opset20
from safetensors.torch import save_file
from torch import Tensor, nn

import canvasmar_rt
from canvasmar_rt.bundle import (
    MANIFEST,
    SCHEMA_VERSION,
    BatchRange,
    Bundle,
    DTypeName,
    FileEntry,
    Manifest,
    Quantization,
    component_entries,
    fixed_dims,
    sha256,
    write_manifest,
)
from canvasmar_rt.components import TensorSpec, components
from canvasmar_rt.config import SamplingConfig
from canvasmar_rt.engines.torch_engine import PART, SCALE, TRANSPOSED
from canvasmar_rt.errors import BundleError, ConfigError, ParityError
from canvasmar_rt.export import compose, parity, tensorrt_ops
from canvasmar_rt.export.card import model_card
from canvasmar_rt.export.quantize import (
    as_product,
    computes_in_int8,
    quantize_products,
    quantize_weight,
)
from canvasmar_rt.files import refusals, replacing
from canvasmar_rt.models.canvasmar import FrameModel
from canvasmar_rt.models.checkpoint import is_finite
from canvasmar_rt.models.families import cast
from canvasmar_rt.models.graphs import FlowEvaluation, FlowPrepare, graph
from canvasmar_rt.schedule import flow_plan, set_sizes
from canvasmar_rt.verify import failures

DTYPES: dict[str, tuple[DTypeName, torch.dtype]] = {
    "fp32": ("float32", torch.float32),
    "fp16": ("float16", torch.float16),
    "bf16": ("bfloat16", torch.bfloat16),
}

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What `canvasmar-rt export` can choose. `weights` "fp16" stores float32 graphs with weights
    rounded to float16, half the size; parity is then against the model with those weights.
    `opset` 0 takes 20 for float32 graphs, else 23, where attention is one node: TensorRT does not
    build it in float32, and hosts with an ONNX Runtime before 1.23 do not know it.
    `quantize` "int8" runs the matrix products of float32 graphs in int8 (`export.quantize`), for
    the CPU; parity is against the float32 model.
    `drift_frames` is the length of the rollout compared with PyTorch. `card` is Markdown that
    joins the bundle's model card: how the weights were trained, what they reach. `unroll` copies
    the flow head for every evaluation instead of looping over one, which CUDA graphs of ONNX
    Runtime need and which fixes the solver and its steps. `fast` is kept as the bundle's profile of
    that name."""

    dtype: str = "fp32"
    weights: str = ""
    quantize: str = "none"
    opset: int = 0
    batch: BatchRange = dataclasses.field(default_factory=BatchRange)
    seed: int = 0
    drift_frames: int = 32
    card: str = ""
    unroll: bool = False
    fast: SamplingConfig | None = None

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.weights not in ("", self.dtype) and (self.dtype, self.weights) != ("fp32", "fp16"):
            raise ConfigError(
                f"weights can be stored in the graph's dtype, or in fp16 under an fp32 graph; got "
                f"weights {self.weights!r} under {self.dtype!r}"
            )
        if self.quantize not in typing.get_args(Quantization):
            raise ConfigError(
                f"quantize must be one of {', '.join(typing.get_args(Quantization))}, got "
                f"{self.quantize!r}"
            )
        if self.quantize != "none" and self.dtype != "fp32":
            raise ConfigError(
                f"{self.quantize} quantises float32 graphs: leave --dtype {self.dtype} out (with "
                "--weights fp16 the weights that stay in floating point are stored in fp16)"
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must lie in [0, 2**63), got {self.seed}")
        if self.drift_frames < 1:
            raise ConfigError(f"drift_frames must be >= 1, got {self.drift_frames}")
        if not self.opset:
            object.__setattr__(self, "opset", 20 if self.dtype == "fp32" else 23)
        if self.opset not in tensorrt_ops.OPSETS:
            raise ConfigError(f"opset must be one of {tensorrt_ops.OPSETS}, got {self.opset}")
        if self.opset != 20 and self.plain:
            raise ConfigError(
                f"opset {self.opset} writes Attention nodes, which TensorRT does not build in "
                "fp32; use opset 20, or --dtype fp16 or bf16"
            )

    @property
    def plain(self) -> bool:
        """Whether products are in float32."""
        return self.dtype == "fp32" and self.quantize == "none"


def export_bundle(
    model: FrameModel,
    sampling: SamplingConfig,
    output: Path,
    options: ExportOptions,
    *,
    source: str,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> Bundle:
    """Export `model` (float32, evaluation mode) into a new bundle directory.

    The directory appears whole, after every graph has passed the operator table and parity has
    been measured within tolerance, or not at all.

    Raises:
        BundleError: if something is at `output` (but for an empty folder, and with `force` a
            bundle), at the start or at the end, or a graph holds an operator
            TensorRT does not take.
        ConfigError: if options do not go together or ask for more AR steps than a frame has tokens,
            or nothing is large enough for int8.
        InputError: if it cannot be written.
        ParityError: if a component or a rollout is further from PyTorch than the tolerance, or a
            weight or a rollout is not finite.
    """
    check_free(output, force)
    profiles = [s for s in (sampling, options.fast) if s is not None]
    for profile in profiles:  # more steps than tokens are refused before anything is traced
        set_sizes(model.config.tokens, profile.ar_steps)
    evaluations = {len(flow_plan(profile).time) for profile in profiles}
    if options.unroll and len(evaluations) > 1:
        raise ConfigError(
            "unroll fixes the evaluations of the flow head: the fast profile needs the solver and "
            "the flow steps of the default one"
        )
    output = output.resolve()
    with refusals(output):
        work = output.with_name(f".{output.name}.{secrets.token_hex(8)}")
        try:
            work.mkdir()
            _write(model, sampling, work, options, source, progress)
            check_free(output, force)  # another may have come meanwhile
            if _taken(output):
                old = Path(tempfile.mkdtemp(prefix=f".{output.name}.old.", dir=output.parent))
                os.replace(output, old / output.name)
                try:
                    os.replace(work, output)
                except BaseException:
                    os.replace(old / output.name, output)
                    raise
                finally:
                    shutil.rmtree(old, ignore_errors=True)
            else:
                os.replace(work, output)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise
    return Bundle.open(output)


def _taken(output: Path) -> bool:
    """Whether something is there; an empty folder is nothing."""
    return output.exists() and not (output.is_dir() and not any(output.iterdir()))


def check_free(output: Path, force: bool) -> None:
    """Raise `BundleError` if a bundle may not take this place."""
    if not _taken(output):
        return
    if not (output / MANIFEST).is_file():
        raise BundleError(f"{output} exists and is not a bundle; give another --output")
    if not force:
        raise BundleError(f"{output} exists; give another --output, or --force to replace it")


def _write(
    model: FrameModel,
    sampling: SamplingConfig,
    work: Path,
    options: ExportOptions,
    source: str,
    progress: Progress,
) -> None:
    config = model.config
    dtype_name, dtype = DTYPES[options.dtype]
    halved = options.weights == "fp16" and options.dtype == "fp32"
    reference = model
    if halved:
        reference = cast(cast(copy.deepcopy(model), torch.float16), torch.float32)
    narrowed = dtype != torch.float32
    cast_model = cast(copy.deepcopy(reference), dtype) if narrowed else reference
    weights_dtype: DTypeName = "float16" if halved else dtype_name
    for name, tensor in cast_model.state_dict().items():  # before minutes go into tracing
        if not is_finite(tensor):
            raise parity.not_finite(
                f"weight {name} is not finite in {weights_dtype}", weights_dtype
            )
    graphs = trace(cast_model, sampling, options, progress)
    if options.quantize != "none" and not any(map(computes_in_int8, graphs.values())):
        raise ConfigError(
            f"quantize {options.quantize}: no product of this model is large enough; leave "
            "--quantize out"
        )
    progress("writing graphs and weights")
    files = write_graphs(
        graphs,
        cast_model,
        work,
        halve=halved,
        quantized=options.quantize != "none",
        cut=options.plain and not model.flow.additive,
    )
    for name, graph_ in graphs.items():
        if options.quantize == "none" and (problems := tensorrt_ops.problems(graph_)):
            raise BundleError(f"{name}: TensorRT would refuse this graph: {'; '.join(problems)}")
    del graphs  # they still hold folded constants; big models need the room
    ae = model.autoencoder
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        producer={
            "canvasmar_rt": canvasmar_rt.__version__,
            "torch": torch.__version__,
            "onnx": onnx.__version__,
        },
        source=source,
        model=config,
        sampling=sampling,
        dtype=dtype_name,
        weights_dtype=weights_dtype,
        opset=options.opset,
        batch=options.batch,
        latent_mean=tuple(ae.latent_mean.tolist()),
        latent_std=tuple(ae.latent_std.tolist()),
        components=component_entries(config, dtype_name),
        unrolled=options.unroll,
        fast=options.fast,
        quantization=typing.cast(Quantization, options.quantize),
        files=_hashes(work, files),
    )
    write_manifest(work, manifest)
    certificate, golden = parity.measure(
        Bundle.open(work),
        reference,
        seed=options.seed,
        frames=options.drift_frames,
        progress=progress,
    )
    manifest = dataclasses.replace(manifest, parity=certificate)
    (work / "README.md").write_text(model_card(manifest, options.card), encoding="utf-8")
    manifest = dataclasses.replace(manifest, files=_hashes(work, [*files, *golden, "README.md"]))
    write_manifest(work, manifest)
    if problems := failures(certificate):
        raise ParityError("export refused: " + "; ".join(problems))


def _hashes(work: Path, names: Sequence[str]) -> dict[str, FileEntry]:
    return {
        name: FileEntry(sha256=sha256(work / name), bytes=(work / name).stat().st_size)
        for name in names
    }


# -- tracing

EXAMPLE_SIZES = {"B": 2, "G": 3, "S": 5, "K": 7, "M": 9, "E": 4, "R": 6}
"""Sizes of symbolic dimensions while tracing: all different, none 0 or 1."""


def trace(
    model: FrameModel, sampling: SamplingConfig, options: ExportOptions, progress: Progress
) -> dict[str, ModelProto]:
    """ONNX graphs of all components of `model`, whose weights have the graphs' dtype."""
    config, opset = model.config, options.opset
    dtype_name, dtype = DTYPES[options.dtype]
    if config.tokens < 16:
        raise ConfigError(f"{config.name}: a latent frame has {config.tokens} tokens, 16 needed")

    def example(spec: TensorSpec) -> Tensor:
        shape = [EXAMPLE_SIZES[d] if isinstance(d, str) else d for d in spec.dims]
        if spec.dtype == "int64":
            orders = [torch.randperm(config.tokens) for _ in range(math.prod(shape[:-1]))]
            return torch.stack([x[: shape[-1]] for x in orders]).view(shape)
        if spec.dtype == "uint8":
            return torch.randint(0, 256, shape, dtype=torch.uint8)
        return torch.randn(shape).to(dtype if spec.dtype == "hidden" else torch.float32)

    graphs: dict[str, ModelProto] = {}
    table = components(config)

    def dynamic(spec: TensorSpec) -> dict[int, str]:
        return {i: d for i, d in enumerate(spec.dims) if isinstance(d, str)}

    def finished(part: ModelProto) -> ModelProto:
        return part if options.quantize == "none" else quantize_products(part)

    for name, component in table.items():
        if name in ("flow", "frame"):
            continue
        progress(f"tracing {name}")
        dims = [dynamic(s) for s in component.inputs]
        traced = to_onnx(
            graph(model, name),
            tuple(example(s) for s in component.inputs),
            (tuple(dims),),
            [s.name for s in component.inputs],
            [s.name for s in component.outputs],
            opset,
        )
        graphs[name] = traced if name == "encoder" else finished(traced)
    progress("tracing flow")
    specs = {s.name: s for s in table["flow"].inputs}
    names = ("z_tokens", "select_index", "flow_noise", "flow_time")
    args = [example(specs[n]) for n in names]
    dims = [dynamic(specs[n]) for n in names]
    preparing = FlowPrepare(model, cut=True).eval()
    with torch.inference_mode():
        x, time, *given = preparing(*args)
    conditions = [f"condition_{i}" for i in range(len(given))]
    prepare = to_onnx(
        preparing,
        tuple(args),
        tuple(dims),
        list(names),
        ["x", "time", *conditions],
        opset,
    )
    evaluate = to_onnx(
        FlowEvaluation(model, cut=options.plain).eval(),
        (
            x.clone(),
            x.clone(),
            time[0].clone(),
            torch.tensor(0.1),
            torch.tensor(0.2),
            torch.randn(EXAMPLE_SIZES["G"]),
            *(part.clone() for part in given),
        ),
        (
            *({0: "B", 1: "S"}, {0: "B", 1: "S"}, {}, {}, {}, {0: "G"}),
            tuple({0: "G", 1: "B", 2: "S"} for _ in given),
        ),
        ["x", "velocity", "time", "step_new", "step_old", "branch_weight", *conditions],
        ["next_x", "next_velocity"],
        opset,
    )
    fixed = {n: fixed_dims(n, sampling, unrolled=options.unroll) for n in table}
    graphs["flow"] = compose.flow(
        finished(prepare),
        finished(evaluate),
        config,
        dtype_name,
        opset,
        evaluations=fixed["flow"].get("E"),
    )
    for name, part in graphs.items():
        _describe(part, table[name].inputs, table[name].outputs, dtype_name, fixed[name])
    if "frame" in table:
        progress("composing the whole frame")
        graphs["frame"] = compose.whole_frame(
            graphs,
            config,
            sampling,
            dtype_name,
            opset,
            fixed["frame"],
            look_up=options.quantize != "none" and "unconditional" in graphs,
        )
    return graphs


def _describe(
    part: ModelProto,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    dtype: str,
    dims: Mapping[str, int],
) -> None:
    """Give a graph the table's names, dtypes and dimensions, and no other shape annotations."""
    for values, specs in ((part.graph.input, inputs), (part.graph.output, outputs)):
        assert [v.name for v in values] == [s.name for s in specs]
        wanted = [compose.value_info(s, dtype, dims) for s in specs]
        for value, want in zip(values, wanted, strict=True):
            assert value.type.tensor_type.elem_type == want.type.tensor_type.elem_type, value.name
        del values[:]
        values.extend(wanted)
    del part.graph.value_info[:]


def to_onnx(
    module: nn.Module,
    args: tuple[Tensor, ...],
    dynamic_shapes: Any,
    inputs: list[str],
    outputs: list[str],
    opset: int,
) -> ModelProto:
    with quiet():
        program = torch.onnx.export(
            module,
            args,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=dynamic_shapes,
            input_names=inputs,
            output_names=outputs,
            custom_translation_table=None if opset >= 23 else {ATTENTION: _attention},
            verbose=False,
        )
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:  # metadata names source files of the exporting machine
        del node.metadata_props[:]
        node.doc_string = ""
    del proto.metadata_props[:]
    proto.graph.doc_string = ""
    made: ModelProto = proto
    assert not made.functions
    _widen(made)
    return made


MOVES = ("DepthToSpace", "Pad", "Resize")
"""What ONNX Runtime has no bfloat16 kernels for, on a GPU either. They only move numbers."""


def _widen(proto: ModelProto) -> None:
    """Let bfloat16 pass through `MOVES` as float32, which changes nothing."""
    g, kind = proto.graph, TensorProto
    types = {v.name: v.type.tensor_type.elem_type for v in (*g.input, *g.value_info, *g.output)}
    types |= {t.name: t.data_type for t in g.initializer}
    nodes = []
    for node in g.node:
        if node.op_type not in MOVES or types[node.input[0]] != kind.BFLOAT16:
            nodes.append(node)
            continue
        for i, name in enumerate(node.input):
            if types.get(name) == kind.BFLOAT16:
                node.input[i] = f"{node.name}_wide_{i}"
                nodes.append(make_node("Cast", [name], [node.input[i]], to=kind.FLOAT))
        (name,) = node.output
        node.output[0] = f"{node.name}_wide"
        nodes += [node, make_node("Cast", [node.output[0]], [name], to=kind.BFLOAT16)]
    del g.node[:]
    g.node.extend(nodes)


ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


def _attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **options: Any
) -> Any:
    """Attention of (R, H, L, Dh) in opsets without a node for it. PyTorch's own translation swaps
    the axes of the keys through their shape, eight nodes a layer, and takes a copy for it."""
    assert not any((*rest, *options.values())), "plain attention: no dropout, no causal mask"
    op: Any = opset20  # its types want to know the dtype
    scale = op.CastLike(op.Constant(value_float=query.shape[-1] ** -0.5), query)
    scores = op.MatMul(op.Mul(query, scale), op.Transpose(key, perm=[0, 1, 3, 2]))
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporter's deprecation warnings and notes about optional packages are not the user's."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# -- weights

EXTERNAL_BYTES = 1024
"""Smaller tensors stay inside the graph."""


def write_graphs(
    graphs: Mapping[str, ModelProto],
    model: FrameModel,
    work: Path,
    *,
    halve: bool,
    quantized: bool,
    cut: bool,
) -> list[str]:
    """Write the graphs and one safetensors file of weights per directory, which the graphs refer
    to as external data, so that the whole-frame graph shares the components' files.

    Every tensor of the state dictionary is in exactly one file, under its own name, or transposed
    (name + "^T") if its graph reads it that way: a bundle is also a checkpoint. One that the graphs
    read in int8 is there as such, transposed, a convolution (N, C, 3, 3) as (3, 3, C, N), with the
    scales of its channels (name + "^scale").
    One that the graphs read in parts is there in parts (name + "^0", "^1", ...).

    Returns:
        Paths of the files written, relative to `work`.
    """
    config = model.config
    table = components(config)
    homes = {
        "temporal": ("temporal.",),
        "canvas": ("canvas.",),
        "spatial": ("spatial.",),
        "flow": ("flow.",),
        "encoder": ("autoencoder.encoder.",),
        "decoder": ("autoencoder.decoder.", "autoencoder.latent_"),
    }
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    if cut:  # as `CutModulation` does
        whole = state.pop(name := "flow.modulation.weight")
        parts = whole.chunk(config.flow.modulations)
        state |= {f"{name}{PART}{i}": part.contiguous() for i, part in enumerate(parts)}
    home_of = {k: h for h, prefixes in homes.items() for k in state if k.startswith(prefixes)}
    keys: dict[str, dict[bytes, str]] = {home: {} for home in homes}  # by home and contents
    int8: dict[str, tuple[Tensor, Tensor]] = {}  # by name: weight transposed, scales
    large = {
        label: [
            (tensor, _digest_raw(tensor.data_type, tensor.dims, tensor.raw_data))
            for tensor in proto.graph.initializer
            if len(tensor.raw_data) >= EXTERNAL_BYTES
        ]
        for label, proto in graphs.items()
    }
    read = {digest for tensors in large.values() for _, digest in tensors}
    for name, tensor in state.items():
        known = keys[home_of[name]]
        as_is = {_digest(tensor): name}
        if tensor.ndim == 2:
            as_is.setdefault(_digest(tensor.T.contiguous()), name + TRANSPOSED)
        for digest, own in as_is.items():
            known.setdefault(digest, own)
        # in 8 bits and in their scales all weights that are all zero are alike: one that a graph
        # reads in floating point stays so
        if tensor.ndim in (2, 4) and quantized and not as_is.keys() & read:
            x = tensor.numpy()
            weight, scale = quantize_weight(as_product(x) if x.ndim == 4 else x.T.copy())
            known.setdefault(_digest(torch.from_numpy(weight)), name + TRANSPOSED)
            known.setdefault(_digest(torch.from_numpy(scale)), name + SCALE)
            shape = x.transpose(2, 3, 1, 0).shape if x.ndim == 4 else weight.shape
            int8[name] = torch.from_numpy(weight.reshape(shape)), torch.from_numpy(scale)

    uses: dict[str, dict[str, list[str]]] = {}  # graph -> key -> initializers
    stored: set[str] = set()
    narrow: set[str] = set()  # of those, what is read in int8
    for label, initializers in large.items():
        directory = Path(table[label].file).parent.name
        within = [keys[directory]] if directory else list(keys.values())
        for tensor, digest in initializers:
            key = next((known[digest] for known in within if digest in known), None)
            if key is not None:
                uses.setdefault(label, {}).setdefault(key, []).append(tensor.name)
                stored.add(key)
                if tensor.data_type == TensorProto.INT8 or key.endswith(SCALE):
                    narrow.add(key)
    written = []
    places: dict[str, Place] = {}
    for home in homes:
        tensors = {}
        for name, value in state.items():
            if home_of[name] != home:
                continue
            if narrow & {name + TRANSPOSED, name + SCALE}:
                tensors[name + TRANSPOSED], tensors[name + SCALE] = int8[name]
                continue
            if name + TRANSPOSED in stored:
                tensors[name + TRANSPOSED] = value.T.contiguous()
            if name in stored or name + TRANSPOSED not in stored:
                tensors[name] = value
        if not tensors:
            continue
        if halve:
            tensors = {
                k: v.half() if k in stored - narrow and v.dtype == torch.float32 else v
                for k, v in tensors.items()
            }
        (work / home).mkdir(exist_ok=True)
        path = f"{home}/model.safetensors"
        with replacing(work / path) as temporary:
            save_file(tensors, temporary)
        written.append(path)
        places |= _places(work, path)
    for label, proto in graphs.items():
        component = table[label]
        folder = PurePosixPath(component.file).parent
        for key, names in uses.get(label, {}).items():
            for name in names:
                _externalise(proto, name, places[key], folder)
        file = work / component.file
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(proto.SerializeToString())
        onnx.checker.check_model(file)
        written.append(component.file)
    return written


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies in a safetensors file of the bundle, in bytes from its start."""

    path: str
    offset: int
    length: int
    dtype: str


def _externalise(proto: ModelProto, name: str, place: Place, folder: PurePosixPath) -> None:
    """Make an initializer of a graph in `folder` read its values from a weight file."""
    # "/" on Windows, too: a backslash is part of a name elsewhere
    location = str(PurePosixPath(place.path).relative_to(folder))
    tensor = next(t for t in proto.graph.initializer if t.name == name)
    set_external_data(tensor, location, place.offset, place.length)
    tensor.ClearField("raw_data")
    if tensor.data_type == TensorProto.FLOAT and place.dtype == "F16":
        tensor.data_type = TensorProto.FLOAT16
        tensor.name = f"{name}.fp16"
        widen = make_node("Cast", [tensor.name], [name], f"{name}.widen", to=TensorProto.FLOAT)
        proto.graph.node.insert(0, widen)


def _places(work: Path, path: str) -> dict[str, Place]:
    """Where each tensor of a safetensors file lies."""
    with (work / path).open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    header.pop("__metadata__", None)
    places = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        places[name] = Place(path, 8 + size + begin, end - begin, entry["dtype"])
    return places


def _digest(tensor: Tensor) -> bytes:
    element = compose.ELEMENT_TYPES[str(tensor.dtype).removeprefix("torch.")]
    raw = tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
    return _digest_raw(element, tensor.shape, raw)


def _digest_raw(element: int, dims: Sequence[int], raw: bytes) -> bytes:
    return hashlib.sha256(f"{element}:{list(dims)}:".encode() + raw).digest()
