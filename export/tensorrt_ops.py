"""What TensorRT 10.16 and 11 parse, as data, and the check that a graph stays inside it.

From the ONNX-TensorRT operator table and what was seen with the TensorRT-RTX 1.7 parser.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, numpy_helper

OPSETS = (20, 23, 24)
"""Opsets the exporter writes (26 has been seen to give invalid files)."""

PLAIN = frozenset(
    """Add And AveragePool Cast Ceil Clip Concat Constant ConstantOfShape Conv Cos DepthToSpace Div
    Einsum Equal Erf Exp Expand Flatten Floor Gather GatherElements Gelu Gemm GlobalAveragePool
    Greater GroupNormalization Identity InstanceNormalization LayerNormalization Less Log MatMul
    Max Min Mod Mul Neg Not Or Pow RMSNormalization Range ReduceMax ReduceMean ReduceSum
    Reciprocal Relu Reshape RotaryEmbedding Round Scan Shape Sigmoid Sin Slice Softmax
    SpaceToDepth Split Sqrt Squeeze Sub Swish Tanh Transpose Unsqueeze Where""".split()
)
"""Ops taken in every form this project writes."""

TOPK_LIMIT = 3840


def problems(model: ModelProto) -> list[str]:
    """Every node TensorRT would refuse, each as one line; empty when the graph is fine."""
    types = {t.name: t.data_type for t in model.graph.initializer}
    types |= {i.name: i.type.tensor_type.elem_type for i in model.graph.input}
    values = {
        t.name: t
        for t in model.graph.initializer
        if t.data_location != TensorProto.EXTERNAL and t.dims in ([], [1])
    }
    found = []
    for opset in model.opset_import:
        if opset.domain not in ("", "ai.onnx"):
            found.append(f"operator domain {opset.domain!r} is not standard ONNX")
        elif opset.version not in OPSETS:
            found.append(f"opset {opset.version} is not one of {OPSETS}")
    for value in (*model.graph.input, *model.graph.output):
        for i, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.HasField("dim_value") and dim.dim_value == 0:
                found.append(f"{value.name}: dimension {i} is empty")
    half = any(t in (TensorProto.FLOAT16, TensorProto.BFLOAT16) for t in types.values())
    for node in _nodes(model.graph):
        reason = _refused(node, values, half)
        if reason:
            found.append(f"{node.op_type} ({node.name}): {reason}")
    return found


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _nodes(attribute.g)


def _refused(node: NodeProto, values: dict[str, TensorProto], half: bool) -> str:
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type in PLAIN:
        return ""
    if node.op_type == "Attention":
        return "" if half else "builds only in fp16 and bf16; export fp32 with opset 20"
    if node.op_type in ("ScatterElements", "ScatterND"):
        reduction = attributes.get("reduction", b"none")
        return "" if reduction == b"none" else f"reduction {reduction.decode()} does not parse"
    if node.op_type == "Pad":
        mode = attributes.get("mode", b"constant")
        return "" if mode in (b"constant", b"edge") else f"mode {mode.decode()} does not parse"
    if node.op_type == "Resize":
        mode = attributes.get("mode", b"nearest")
        plain = mode == b"nearest" and not attributes.get("antialias", 0)
        return "" if plain else f"mode {mode.decode()} or antialiasing has not been seen to parse"
    if node.op_type == "TopK":
        k = values.get(node.input[1])
        if k is None:
            return "K must be a constant"
        size = int(numpy_helper.to_array(k).reshape(()))
        return "" if size <= TOPK_LIMIT else f"K = {size} is above {TOPK_LIMIT}"
    return "not in the table of operators TensorRT takes"
