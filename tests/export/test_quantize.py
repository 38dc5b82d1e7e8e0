"""Int8: which products, how near, what a bundle stores of them, and where it runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

import canvasmar_rt
from canvasmar_rt.bundle import Bundle
from canvasmar_rt.components import components
from canvasmar_rt.config import FlowConfig, SamplingConfig
from canvasmar_rt.engines import create
from canvasmar_rt.engines.torch_engine import load_model
from canvasmar_rt.errors import BundleError, ConfigError, EngineError
from canvasmar_rt.export import exporter
from canvasmar_rt.export.exporter import ExportOptions, export_bundle
from canvasmar_rt.export.quantize import (
    NARROWEST,
    SMALLEST,
    as_product,
    quantize_products,
    quantize_weight,
)
from canvasmar_rt.models.canvasmar import CanvasMAR
from canvasmar_rt.models.families import build, cast
from canvasmar_rt.schedule import set_sizes
from canvasmar_rt.verify import verify
from tests.conftest import least_config

CONFIG = least_config("wide", flow=FlowConfig(width=192, blocks=1), dim=192, canvas_conv=64)
CONFIG = dataclasses.replace(
    CONFIG,
    autoencoder=dataclasses.replace(CONFIG.autoencoder, height=16, width=16, widths=(64, 32)),
)
SAMPLING = SamplingConfig(ar_steps=2, flow_steps=2)

Export = Callable[..., Bundle]


@pytest.fixture(scope="module")
def model() -> CanvasMAR:
    """Weights that float16 holds exactly."""
    return cast(cast(build(CONFIG, seed=1), torch.float16), torch.float32)


@pytest.fixture(scope="module")
def export(model: CanvasMAR, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Export]:
    """Exports of `model` with options; every module is traced once."""
    traced: dict[tuple[str, str], ModelProto] = {}
    trace_module = exporter.to_onnx

    def once(module: Any, *rest: Any) -> ModelProto:
        key = type(module).__name__, getattr(getattr(module, "component", None), "name", "")
        if key not in traced:
            traced[key] = trace_module(module, *rest)
        copy = ModelProto()
        copy.CopyFrom(traced[key])
        return copy

    def exported(**options: Any) -> Bundle:
        return export_bundle(
            model,
            SAMPLING,
            tmp_path_factory.mktemp("int8") / "b",
            ExportOptions(quantize="int8", drift_frames=4, **options),
            source="test",
        )

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exporter, "to_onnx", once)
        yield exported


@pytest.fixture(scope="module")
def bundle(export: Export) -> Bundle:
    return export()


def every_node(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from every_node(attribute.g)


def stored(bundle: Bundle) -> dict[str, np.ndarray]:
    return {
        name: tensor
        for file in bundle.manifest.files
        if file.endswith("/model.safetensors")
        for name, tensor in load_file(bundle.path / file).items()
    }


# One graph


def test_a_weight_is_within_half_a_scale() -> None:
    weight = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    weight[:, 3] *= 1000
    weight[:, 5] = 0
    weight[1:, 6] = 0
    int8, scale = quantize_weight(weight)
    assert (int8.dtype, scale.dtype, scale.shape) == (np.int8, np.float32, (7,))
    assert (np.abs(int8).max(axis=0) <= [127, 127, 127, 127, 127, 0, 127]).all()
    assert (np.abs(int8).max(axis=0) >= [80, 80, 80, 80, 80, 0, 127]).all()
    assert (np.abs(int8 * scale - weight) <= 0.5001 * scale).all()


@pytest.mark.parametrize("inputs", [192, 193])
@pytest.mark.parametrize("rows", [1, 7])
def test_no_cpu_overflows(inputs: int, rows: int) -> None:
    """The sums of neighbouring products that some CPUs make in 16 bits are what they are in 64,
    whatever the activations."""
    rng = np.random.default_rng(3)
    weight = rng.normal(size=(inputs, 96)).astype(np.float32)
    weight[:, :32] = np.abs(weight[:, :32])
    weight[:, 32:64] = -1
    int8, _ = quantize_weight(weight)
    pairs = np.pad(int8, ((0, inputs % 2), (0, 0))).astype(int).reshape(-1, 2, 96)
    most_added = max(pairs.clip(min=0).sum(axis=1).max(), -pairs.clip(max=0).sum(axis=1).min())
    assert 255 * most_added < 2**15, "this CPU may be one that adds in 32 bits"
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", ["x", "w", "zero"], ["y"])],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [rows, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.INT32, [rows, 96])],
        [numpy_helper.from_array(int8, "w"), numpy_helper.from_array(np.uint8(9), "zero")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    most = np.full((rows, inputs), 255, np.uint8)
    for x in (most, rng.integers(128, 256, most.shape, np.uint8)):
        (y,) = session.run(None, {"x": x})
        np.testing.assert_array_equal(y, (x.astype(np.int64) - 9) @ int8.astype(np.int64))


def small_graph(weight: np.ndarray, narrow: np.ndarray) -> ModelProto:
    """y = x W + b twice, z = y V with a narrow V, and s = y y^T: the last two stay in float."""
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"], "first"),
        helper.make_node("Add", ["p", "b"], ["q"]),
        helper.make_node("MatMul", ["q", "w"], ["r"], "second"),
        helper.make_node("Add", ["r", "b"], ["y"]),
        helper.make_node("MatMul", ["y", "v"], ["z"], "narrow"),
        helper.make_node("Transpose", ["y"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["y", "t"], ["s"], "scores"),
    ]
    values = {"w": weight, "v": narrow, "b": np.ones(192, np.float32)}
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", "L", 192])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["B", "L", last])
            for name, last in (("y", 192), ("z", 64), ("s", "L"))
        ],
        [numpy_helper.from_array(v, k) for k, v in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def test_products_by_large_constants_run_in_int8(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    weight = (rng.normal(size=(192, 192)) / 192**0.5).astype(np.float32)
    model = small_graph(weight, rng.normal(size=(192, 64)).astype(np.float32))
    before = model.SerializeToString()
    made = quantize_products(model)
    assert model.SerializeToString() == before
    onnx.checker.check_model(made)
    left = [n.name for n in made.graph.node if n.op_type == "MatMul"]
    assert left == ["narrow", "scores"]
    assert sorted(t.name for t in made.graph.initializer) == ["b", "v", "w_int8", "w_scale"]

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.log_severity_level = 3
    session = ort.InferenceSession(
        made.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    x = rng.normal(size=(2, 5, 192)).astype(np.float32)
    y, z, _ = session.run(None, {"x": x})
    want = (x @ weight + 1) @ weight + 1
    assert 1e-3 < np.linalg.norm(y - want) / np.linalg.norm(want) < 2e-2
    want_z = y @ numpy_helper.to_array(model.graph.initializer[1])
    np.testing.assert_allclose(z, want_z, rtol=1e-4, atol=1e-5 * np.abs(want_z).max())
    fused = onnx.load(options.optimized_model_filepath)
    assert [n.op_type for n in fused.graph.node].count("DynamicQuantizeMatMul") == 2


def convolution(weight: np.ndarray, *, biased: bool = True, **attributes: Any) -> ModelProto:
    """y = Conv(x) of (B, C, 5, 7), and z, that of y's SiLU by the same weight."""
    node = attributes.pop("node", {"pads": [1, 1, 1, 1], "kernel_shape": list(weight.shape[2:])})
    names = ["w", "b"] if biased else ["w"]
    values = {"w": weight, "b": np.linspace(-1, 1, len(weight), dtype=np.float32)}
    make = helper.make_node
    nodes = [
        make("Conv", ["x", *names], ["y"], "first", **(node | attributes)),
        make("Sigmoid", ["y"], ["s"]),
        make("Mul", ["y", "s"], ["silu"]),
        make("Conv", ["silu", *names], ["z"], "second", **(node | attributes)),
    ]
    graph = helper.make_graph(
        nodes,
        "convolutions",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", weight.shape[1], 5, 7])],
        [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, [n + d for d in "BNHW"])
            for n in "yz"
        ],
        [numpy_helper.from_array(values[name], name) for name in names],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.mark.parametrize("biased", [True, False])
def test_convolutions_run_in_int8(biased: bool) -> None:
    """The quantised picture, with zeros around, by the quantised weight."""
    rng = np.random.default_rng(2)
    weight = (rng.normal(size=(64, 64, 3, 3)) / 24).astype(np.float32)
    model = convolution(weight, biased=biased)
    made = quantize_products(model)
    onnx.checker.check_model(made)
    kinds = [node.op_type for node in made.graph.node]
    assert "Conv" not in kinds
    assert kinds.count("MatMulInteger") == 2
    sizes = {t.name: list(t.dims) for t in made.graph.initializer}
    assert sizes.pop("w_int8") == [9 * 64, 64]
    assert sizes["around_5x7"] == [5, 7, 9]
    assert "w" not in sizes

    x = rng.normal(size=(2, 64, 5, 7)).astype(np.float32)
    low, high = min(x.min(), 0), max(x.max(), 0)
    step = (high - low) / 255
    quantised = np.clip(np.rint(x / step) + np.rint(-low / step), 0, 255) - np.rint(-low / step)
    w, scales = quantize_weight(as_product(weight))
    w = w.reshape(3, 3, 64, 64).transpose(3, 2, 0, 1)
    exact = torch.nn.functional.conv2d(
        torch.from_numpy(quantised.astype(np.float64)),
        torch.from_numpy(w.astype(np.float64)),
        padding=1,
    ).numpy()
    bias = np.linspace(-1, 1, 64)[:, None, None] if biased else 0
    y, z = session(made).run(None, {"x": x})
    np.testing.assert_allclose(y, exact * (step * scales)[:, None, None] + bias, atol=1e-4)
    want_y, want_z = session(model).run(None, {"x": x})
    for got, want in ((y, want_y), (z, want_z)):
        assert 1e-3 < np.linalg.norm(got - want) / np.linalg.norm(want) < 2e-2


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ((64, 64, 3, 3), {"strides": [2, 2]}),
        ((64, 64, 3, 3), {"dilations": [2, 2]}),
        ((64, 32, 3, 3), {"group": 2}),
        ((64, 64, 3, 3), {"pads": [0, 0, 0, 0]}),
        ((64, 64, 3, 3), {"node": {"auto_pad": "SAME_UPPER"}}),
        ((64, 64, 1, 1), {}),
        ((NARROWEST - 1, NARROWEST - 1, 3, 3), {}),
    ],
)
def test_other_convolutions_stay(shape: tuple[int, ...], options: dict[str, Any]) -> None:
    model = convolution(np.ones(shape, np.float32), **options)
    assert [n.op_type for n in quantize_products(model).graph.node].count("Conv") == 2


def session(model: ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


# A bundle

LARGE = {
    name
    for name, tensor in build(CONFIG).state_dict().items()
    if (tensor.ndim == 2 and min(tensor.shape) >= SMALLEST and not name.startswith("flow.time"))
    or (tensor.ndim == 4 and len(tensor) >= NARROWEST and "encoder" not in name.split("."))
}
"""Weights of products over tokens and of convolutions; the flow's time is embedded once for all."""


EXACT = ("encoder", "unconditional")
"""Components without a product in int8."""


def test_products_over_tokens_are_stored_in_int8(bundle: Bundle) -> None:
    # four in each of four layers; flow: condition, modulation, MLP; two in canvas, three in decoder
    assert len(LARGE) == 4 * 4 + 4 + 2 + 3
    tensors = stored(bundle)
    int8 = {name for name, tensor in tensors.items() if tensor.dtype == np.int8}
    assert int8 == {f"{name}^T" for name in LARGE}
    assert {name for name in tensors if name.endswith("^scale")} == {f"{n}^scale" for n in LARGE}
    assert all(t.dtype == np.float32 for name, t in tensors.items() if name not in int8)


def test_every_graph_computes_them_in_int8(bundle: Bundle) -> None:
    """The loop of the flow and the whole frame too, and ONNX Runtime has a kernel for all of it."""
    for name in components(CONFIG):
        model = onnx.load(bundle.file(name))
        sizes = {t.name: t.dims for t in model.graph.initializer}
        products = [
            (node.op_type, sizes[node.input[1]])
            for node in every_node(model.graph)
            if node.op_type in ("MatMul", "MatMulInteger") and node.input[1] in sizes
        ]
        convolved = (9 * 192, 9 * 64, 9 * 32)
        convolutions = [kind for kind, dims in products if dims[0] in convolved]
        assert convolutions == ["MatMulInteger"] * {"canvas": 2, "decoder": 3, "frame": 2}.get(
            name, 0
        )
        large = [k for k, dims in products if min(dims) >= SMALLEST and dims[0] not in convolved]
        assert set(large) == (set() if name in (*EXACT, "decoder") else {"MatMulInteger"}), name
        narrow = any(node.op_type == "Conv" for node in every_node(model.graph))
        assert narrow == (name in ("encoder", "decoder"))
        gemms = sum(node.op_type == "Gemm" for node in every_node(model.graph))
        assert gemms == {"temporal": 1, "flow": 2, "frame": 1 + 2 * 2}.get(name, 0)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.optimized_model_filepath = str(bundle.path.parent / "fused.onnx")
        ort.InferenceSession(bundle.file(name), options, providers=["CPUExecutionProvider"])
        fused = onnx.load(options.optimized_model_filepath, load_external_data=False).graph
        kinds = [node.op_type for node in every_node(fused)]
        assert kinds.count("DynamicQuantizeMatMul") == len(large), name
        assert kinds.count("MatMulIntegerToFloat") == len(convolutions), name


def test_it_is_near_the_float_model_and_says_how_near(bundle: Bundle) -> None:
    certificate = bundle.manifest.parity
    assert certificate is not None
    assert bundle.manifest.quantization == "int8"
    for name, found in certificate.components.items():
        exact = name in EXACT
        assert (0 if exact else 1e-3) <= found.relative < (1e-5 if exact else 1e-1), name
    assert 1e-3 < max(certificate.drift) < 0.3
    card = (bundle.path / "README.md").read_text()
    assert "from 160 x 160 on, are int8" in card
    assert "int8 graphs with the float32 model" in card
    assert "operator table was not applied" in card
    assert verify(bundle.path)["flipped_orders"] == certificate.flipped_orders


def test_it_is_a_checkpoint_of_the_weights_it_computes_with(
    bundle: Bundle, model: CanvasMAR
) -> None:
    tensors, state = stored(bundle), load_model(bundle).state_dict()
    for name, want in model.state_dict().items():
        scale = torch.from_numpy(tensors[f"{name}^scale"]) if name in LARGE else torch.zeros(1)
        half = 0.5001 * scale.view(-1, *[1] * max(want.ndim - 1, 0))
        assert (state[name] - want).abs().le(half).all(), name
        assert (name in LARGE) == (not torch.equal(state[name], want)), name
    report = verify(bundle.path, engine="torch")  # without the rounding of activations
    for name, found in report["components"].items():
        # the graphs look up what the float model gives a branch that sees nothing
        like = "spatial_first" if name == "unconditional" else name
        most = 1.1 * bundle.manifest.parity.components[like].relative + 1e-6
        assert found["relative"] < most, name


@pytest.mark.parametrize("count", [1, 3])
def test_scales_that_do_not_fit_their_weight_are_refused(count: int, tmp_path: Path) -> None:
    name = "flow/model.safetensors"
    (tmp_path / "flow").mkdir()
    tensors = {
        "flow.out.weight^T": np.ones((16, 2), np.int8),
        "flow.out.weight^scale": np.ones(count, np.float32),
    }
    save_file(tensors, tmp_path / name)
    manifest: Any = SimpleNamespace(files={name: None}, model=least_config())
    with pytest.raises(BundleError, match=rf"out.weight\^scale has shape \({count},\), expected"):
        load_model(Bundle(tmp_path, manifest))


@pytest.mark.parametrize("engine", ["onnxruntime", "torch", "tensorrt"])
def test_a_gpu_is_refused(bundle: Bundle, engine: str) -> None:
    with pytest.raises(EngineError, match=r"'cuda': int8 bundles run on the CPU.*without --quan"):
        create(engine, bundle, device="cuda")


def test_unrolled_and_with_the_rest_in_half_precision(export: Export, bundle: Bundle) -> None:
    other = export(unroll=True, weights="fp16")
    assert other.manifest.weights_dtype == "float16"
    kinds = {n.op_type for n in onnx.load(other.file("frame"), load_external_data=False).graph.node}
    assert "MatMulInteger" in kinds
    assert "Scan" not in kinds
    tensors = stored(other)
    assert tensors["flow.modulation.weight^T"].dtype == np.int8
    assert tensors["flow.modulation.weight^scale"].dtype == np.float32
    assert tensors["flow.time.0.weight"].dtype == np.float16
    theirs = load_model(bundle).state_dict()
    for name, value in load_model(other).state_dict().items():
        assert torch.equal(value, theirs[name]), name
    latents = [canvasmar_rt.load(b.path).start(seed=1).step().latent for b in (bundle, other)]
    np.testing.assert_allclose(latents[0], latents[1], atol=1e-5)


@pytest.mark.parametrize("in_float", ["flow.time.2.weight", "flow.embed.weight"])
def test_weights_that_are_all_zero_are_not_taken_for_each_other(
    in_float: str, tmp_path: Path
) -> None:
    """One stays in float, one runs in int8, where they have the same codes or the same scales."""
    config = least_config("zeros", flow=FlowConfig(width=256, blocks=1))
    model, in_int8 = build(config), "flow.mlps.0.2.weight"
    weights = model.state_dict()
    for name in (in_float, in_int8):
        weights[name].zero_()
    narrow, scale = quantize_weight(weights[in_int8].numpy().T.copy())
    nodes = [
        helper.make_node("Gemm", ["x", "v"], ["y"], transB=1),
        helper.make_node("MatMulInteger", ["q", "w"], ["p"]),
        helper.make_node("Mul", ["t", "s"], ["u"]),
    ]
    tensors = {
        "x": (TensorProto.FLOAT, weights[in_float].shape[1]),
        "q": (TensorProto.UINT8, 256),
        "t": (TensorProto.FLOAT, 1),
        "y": (TensorProto.FLOAT, 256),
        "p": (TensorProto.INT32, 256),
        "u": (TensorProto.FLOAT, 256),
    }
    values = [
        helper.make_tensor_value_info(name, element, ["B", size])
        for name, (element, size) in tensors.items()
    ]
    constants = {"v": weights[in_float].numpy(), "w": narrow, "s": scale}
    graph = helper.make_graph(
        nodes,
        "zeros",
        values[:3],
        values[3:],
        [numpy_helper.from_array(v, k) for k, v in constants.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    exporter.write_graphs({"flow": made}, model, tmp_path, halve=False, quantized=True, cut=False)
    kept = load_file(tmp_path / "flow/model.safetensors")
    assert (kept[in_float] == 0).all()
    session = ort.InferenceSession(tmp_path / "flow/model.onnx", providers=["CPUExecutionProvider"])
    given = {i.name: np.ones((1, tensors[i.name][1]), np.float32) for i in session.get_inputs()}
    y, p, u = session.run(None, given | {"q": np.ones((1, 256), np.uint8)})
    assert not y.any()
    assert not p.any()
    np.testing.assert_array_equal(u, scale[None])


def test_options_that_contradict_are_refused() -> None:
    with pytest.raises(ConfigError, match="none, int8, got 'int4'"):
        ExportOptions(quantize="int4")
    with pytest.raises(ConfigError, match="leave --dtype fp16 out"):
        ExportOptions(quantize="int8", dtype="fp16", opset=23)


def test_the_whole_frame_draws_as_the_components_do(bundle: Bundle) -> None:
    """Which branches a product sees decides its scale, so both must give it the same."""
    golden = load_file(bundle.path / "golden" / "frame.safetensors")
    have = {n.removeprefix("in."): x for n, x in golden.items() if n.startswith("in.")}
    whole = run(bundle, "frame", have)
    pair = {n: have[n][:2] for n in ("temporal_on", "canvas_on", "branch_weight")}
    assert np.isfinite(run(bundle, "frame", have | pair)["next_latent"]).all()
    on = np.maximum(have["temporal_on"], have["canvas_on"]) > 0
    assert on.tolist() == [True, True, False]
    have |= run(bundle, "temporal", have)
    have |= run(bundle, "canvas", have)
    have |= run(bundle, "condition", have) if "condition" in bundle.manifest.components else {}
    have["partial"], known = np.zeros_like(have["flow_noise"]), 0
    for size in set_sizes(CONFIG.tokens, SAMPLING.ar_steps):
        order = whole["order"]
        have["select_index"] = order[:, known : known + size]
        have["mask_index"], have["known_index"] = order[:, known:], order[:, :known]
        if known:
            have |= run(bundle, "spatial", have)
        else:
            table = components(CONFIG)["spatial_first"].inputs
            seen = {s.name: have[s.name][on] for s in table if "G" in s.dims}
            found = [run(bundle, "spatial_first", have | seen), run(bundle, "unconditional", have)]
            have["z_tokens"] = np.concatenate([x["z_tokens"] for x in found])
            of_all = run(bundle, "spatial_first", have)["z_tokens"]
            assert not np.allclose(of_all, have["z_tokens"], atol=1e-5)
        have["partial"] = run(bundle, "flow", have)["next_partial"]
        known += size
    np.testing.assert_allclose(have["partial"], whole["next_latent"], atol=1e-5)


def run(bundle: Bundle, component: str, have: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(bundle.file(component), providers=["CPUExecutionProvider"])
    made = session.run(None, {i.name: have[i.name] for i in session.get_inputs()})
    return {o.name: x for o, x in zip(session.get_outputs(), made, strict=True)}
