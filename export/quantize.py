"""Int8 matrix products for the CPU: constant weights and, at run time, activations in 8 bits.

A product x W becomes DynamicQuantizeLinear(x) -> MatMulInteger -> Cast -> Mul by both scales, all
standard ONNX, which ONNX Runtime fuses into one kernel. Weights are symmetric int8 with a scale for
every output channel; activations are uint8 with one scale and zero point for the whole tensor.
`onnxruntime.quantization` writes the same nodes, but turns every Gemm into a MatMul first and takes
files, not graphs.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

SMALLEST = 160
"""Products with fewer input or output channels stay in float32. Below about 64 the int8 kernel is
slower than the float one, and what is between are the embeddings of latents and pixels, little work
on which every token of every frame after depends."""


def quantize_weight(
    weight: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """A weight (K, N) float32 as int8 (K, N) in -127..127 and a scale (N,) float32 of its columns;
    their product is within half a scale of the weight."""
    scale = np.maximum(np.abs(weight).max(axis=0), np.float32(1e-30)) / np.float32(127)
    return np.rint(weight / scale).astype(np.int8), scale.astype(np.float32)


def quantize_products(model: ModelProto) -> ModelProto:
    """A copy of a float32 graph in which every MatMul by a constant (K, N), both K and N at least
    `SMALLEST`, runs in int8.

    MatMul nodes are the products over tokens. What is computed once for a video or an evaluation,
    the embeddings of action and flow time, has two dimensions and is a Gemm, which stays as it is:
    it is a few rows, and every token depends on it.
    """
    made = ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    weights = {t.name: t for t in graph.initializer}
    new: dict[str, TensorProto] = {}
    nodes: list[NodeProto] = []
    for node in graph.node:
        weight = weights.get(node.input[1]) if node.op_type == "MatMul" else None
        if weight is None or len(weight.dims) != 2 or min(weight.dims) < SMALLEST:
            nodes.append(node)
            continue
        # no dot: composition takes names with one for names of the state dictionary
        int8, scale = f"{weight.name}_int8", f"{weight.name}_scale"
        if int8 not in new:
            values, scales = quantize_weight(numpy_helper.to_array(weight))
            new[int8] = numpy_helper.from_array(values, int8)
            new[scale] = numpy_helper.from_array(scales, scale)
        nodes += _product(node, int8, scale)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *new.values()])
    return made


def _product(node: NodeProto, int8: str, scale: str) -> list[NodeProto]:
    """The nodes that take a MatMul's place; the last has its output."""
    x, y = node.input[0], node.output[0]
    values, x_scale, zero, total, real, scales = (
        f"{y}_{part}" for part in ("x", "x_scale", "x_zero", "sum", "float", "scale")
    )
    name = f"{node.name}/int8"
    make = helper.make_node
    return [
        make("DynamicQuantizeLinear", [x], [values, x_scale, zero], f"{name}/activations"),
        make("MatMulInteger", [values, int8, zero], [total], f"{name}/product"),
        make("Cast", [total], [real], f"{name}/cast", to=TensorProto.FLOAT),
        make("Mul", [x_scale, scale], [scales], f"{name}/scales"),
        make("Mul", [real, scales], [y], f"{name}/scaled"),
    ]
