"""What TensorRT would refuse, one hand-made graph for each rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from canvasmar_rt.export.tensorrt_ops import OPSETS, PLAIN, TOPK_LIMIT, problems

FLOAT = TensorProto.FLOAT


def model(
    nodes: Sequence[NodeProto],
    *,
    inputs: dict[str, tuple[int, Sequence[int | str | None]]] | None = None,
    outputs: dict[str, tuple[int, Sequence[int | str | None]]] | None = None,
    initializers: Sequence[TensorProto] = (),
    opset: int = 20,
    domains: Sequence[str] = (),
) -> ModelProto:
    """A model with input x and output y (B, 4) unless told otherwise."""
    inputs = {"x": (FLOAT, ["B", 4])} if inputs is None else inputs
    outputs = {"y": (FLOAT, ["B", 4])} if outputs is None else outputs
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(k, *v) for k, v in inputs.items()],
        [helper.make_tensor_value_info(k, *v) for k, v in outputs.items()],
        list(initializers),
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    return helper.make_model(graph, opset_imports=imports, ir_version=10)


def node(op: str, *inputs: str, name: str = "here", **attributes: Any) -> NodeProto:
    return helper.make_node(op, list(inputs) or ["x"], ["y"], name=name, **attributes)


def constant(name: str, value: Any) -> TensorProto:
    return numpy_helper.from_array(np.asarray(value), name)


# -- allowed


def test_an_ordinary_graph_is_fine() -> None:
    made = model(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Gelu", ["h"], ["g"]),
            helper.make_node("Softmax", ["g"], ["s"], axis=-1),
            helper.make_node("LayerNormalization", ["s", "scale"], ["y"]),
        ],
        initializers=[
            constant("w", np.eye(4, dtype=np.float32)),
            constant("scale", np.ones(4, np.float32)),
        ],
    )
    onnx.checker.check_model(made, full_check=True)
    assert problems(made) == []


@pytest.mark.parametrize("op", sorted(PLAIN))
def test_plain_operators_exist_in_onnx_and_pass(op: str) -> None:
    assert onnx.defs.has(op), "a name in the table that is no operator"
    assert problems(model([node(op)])) == []


@pytest.mark.parametrize("opset", OPSETS)
def test_opsets_the_exporter_writes(opset: int) -> None:
    assert problems(model([node("Relu")], opset=opset)) == []


@pytest.mark.parametrize("opset", [9, 19, 21, 22, 25, 26])
def test_other_opsets(opset: int) -> None:
    found = problems(model([node("Relu")], opset=opset))
    assert len(found) == 1
    assert f"opset {opset}" in found[0]


# -- refused


@pytest.mark.parametrize(
    "op",
    [
        "Unique",
        "Compress",
        "NonZero",
        "RandomNormal",
        "RandomNormalLike",
        "BitwiseAnd",
        "SequenceConstruct",
        "SplitToSequence",
        "STFT",
        "NoSuchOperator",
    ],
)
def test_refused_operators_are_named(op: str) -> None:
    (found,) = problems(model([node("Relu"), node(op, name="layer/7")]))
    assert op in found
    assert "layer/7" in found
    assert "\n" not in found


def test_every_problem_is_listed() -> None:
    made = model([node("Unique"), node("Relu"), node("Compress"), node("Unique")], opset=26)
    found = problems(made)
    assert len(found) == 4
    assert sum("Unique" in line for line in found) == 2


@pytest.mark.parametrize("op", ["ScatterElements", "ScatterND"])
def test_scatter_only_without_a_reduction(op: str) -> None:
    assert problems(model([node(op, "x", "i", "u")])) == []
    assert problems(model([node(op, "x", "i", "u", reduction="none")])) == []
    for reduction in ("add", "mul", "max", "min"):
        (found,) = problems(model([node(op, "x", "i", "u", reduction=reduction)]))
        assert f"reduction {reduction}" in found
        assert op in found


def test_pad_modes() -> None:
    assert problems(model([node("Pad", "x", "p")])) == []
    for mode in ("constant", "edge"):
        assert problems(model([node("Pad", "x", "p", mode=mode)])) == []
    for mode in ("reflect", "wrap"):
        (found,) = problems(model([node("Pad", "x", "p", mode=mode)]))
        assert f"mode {mode}" in found


def test_resize_modes() -> None:
    assert problems(model([node("Resize", "x", mode="nearest")])) == []
    assert problems(model([node("Resize", "x")])) == []
    (found,) = problems(model([node("Resize", "x", mode="cubic")]))
    assert "mode cubic" in found
    (found,) = problems(model([node("Resize", "x", mode="nearest", antialias=1)]))
    assert "antialiasing" in found


# -- TopK


@pytest.mark.parametrize(
    ("k", "fine"), [(1, True), (TOPK_LIMIT, True), (TOPK_LIMIT + 1, False), (10**6, False)]
)
@pytest.mark.parametrize("scalar", [True, False])
def test_topk_has_a_limit(k: int, fine: bool, scalar: bool) -> None:
    value = np.int64(k) if scalar else np.array([k], np.int64)
    found = problems(model([node("TopK", "x", "k")], initializers=[constant("k", value)]))
    if fine:
        assert found == []
    else:
        assert len(found) == 1
        assert str(k) in found[0]
        assert str(TOPK_LIMIT) in found[0]
    assert TOPK_LIMIT == 3840


def test_topk_of_a_computed_size() -> None:
    inputs = {"x": (FLOAT, ["B", 4]), "k": (TensorProto.INT64, [1])}
    (found,) = problems(model([node("TopK", "x", "k")], inputs=inputs))
    assert "constant" in found
    computed = helper.make_node("Shape", ["x"], ["k"])
    (found,) = problems(model([computed, node("TopK", "x", "k")]))
    assert "constant" in found


def test_topk_of_a_size_kept_in_another_file() -> None:
    """Its value is not in the graph, so it is not known here and refused rather than guessed."""
    k = constant("k", np.array([4], np.int64))
    k.ClearField("raw_data")
    k.data_location = TensorProto.EXTERNAL
    entry = k.external_data.add()
    entry.key, entry.value = "location", "weights.bin"
    (found,) = problems(model([node("TopK", "x", "k")], initializers=[k]))
    assert "constant" in found


# -- Attention


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_attention_in_half_precision(dtype: int) -> None:
    inputs = {"x": (dtype, ["B", 4, 8])}
    outputs = {"y": (dtype, ["B", 4, 8])}
    attention = node("Attention", "x", "x", "x", q_num_heads=2, kv_num_heads=2)
    assert problems(model([attention], inputs=inputs, outputs=outputs, opset=23)) == []


def test_attention_in_single_precision() -> None:
    attention = node("Attention", "x", "x", "x", q_num_heads=2, kv_num_heads=2)
    (found,) = problems(model([attention], opset=23))
    assert "Attention (here)" in found
    assert "fp16" in found
    assert "opset 20" in found
    # half-precision weights say that the graph is one, its inputs may be float32
    half = constant("w", np.zeros(4, np.float16))
    assert problems(model([attention], initializers=[half], opset=23)) == []


# -- shapes and domains


@pytest.mark.parametrize("where", ["inputs", "outputs"])
def test_empty_dimensions(where: str) -> None:
    name = {"inputs": "x", "outputs": "y"}[where]
    empty: Any = {where: {name: (FLOAT, ["B", 0, 4])}}
    (found,) = problems(model([node("Relu")], **empty))
    assert found.startswith(f"{name}: dimension 1")
    assert "empty" in found


def test_symbolic_unknown_and_no_dimensions_are_not_empty() -> None:
    inputs = {"x": (FLOAT, ["B", None, 4]), "level": (FLOAT, [])}
    assert problems(model([node("Relu")], inputs=inputs)) == []


@pytest.mark.parametrize("domain", ["com.microsoft", "pkg.torch", "ai.onnx.ml"])
def test_foreign_domains(domain: str) -> None:
    found = problems(model([node("Relu", domain=domain)], domains=[domain]))
    assert len(found) == 1
    assert repr(domain) in found[0]


def test_the_standard_domain_by_its_long_name() -> None:
    made = model([node("Relu")])
    made.opset_import[0].domain = "ai.onnx"
    assert problems(made) == []


# -- subgraphs


def body(*nodes: NodeProto) -> onnx.GraphProto:
    return helper.make_graph(
        list(nodes),
        "body",
        [helper.make_tensor_value_info("x", FLOAT, [4])],
        [helper.make_tensor_value_info("y", FLOAT, [4])],
    )


def scan(inner: onnx.GraphProto) -> NodeProto:
    return node("Scan", name="loop", body=inner, num_scan_inputs=1)


def test_subgraphs_are_searched() -> None:
    assert problems(model([scan(body(node("Relu")))])) == []
    (found,) = problems(model([scan(body(node("Relu"), node("Unique", name="deep")))]))
    assert "Unique (deep)" in found
    (found,) = problems(model([scan(body(scan(body(node("Compress", name="deeper")))))]))
    assert "Compress (deeper)" in found


def test_branches_are_refused_and_searched() -> None:
    branch = node("If", "c", then_branch=body(node("Relu")), else_branch=body(node("Unique")))
    found = problems(model([branch]))
    assert len(found) == 2
    assert "If" in found[0]
    assert "Unique" in found[1]
