"""Int8 matrix products for the CPU: constant weights and, at run time, activations in 8 bits.

A product x W becomes DynamicQuantizeLinear(x) -> MatMulInteger -> Cast -> Mul by both scales, all
standard ONNX, which ONNX Runtime fuses into one kernel. Weights are symmetric int8 with a scale for
every output channel; activations are uint8 with one scale and zero point for the whole tensor.
`onnxruntime.quantization` writes the same nodes, but turns every Gemm into a MatMul first and takes
files, not graphs.

A 3x3 convolution becomes such a product of the 3x3 positions around each one: ONNX's own
`ConvInteger` has no fast kernel on a CPU (four to eight times the float convolution's time).
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper, shape_inference

SMALLEST = 160
"""Products with fewer input or output channels stay in float32. Below about 64 the int8 kernel is
slower than the float one, and what is between are the embeddings of latents and pixels, little work
on which every token of every frame after depends."""

NARROWEST = 64
"""3x3 convolutions with fewer output channels stay in float32; they have nine times the products of
a matrix of as many input channels, so these may be fewer than `SMALLEST`."""

PAIR = 128
"""The most that two neighbouring weights of one sign may add up to: 128 * 255 < 2**15."""

Weight = npt.NDArray[np.float32]


def as_product(weight: Weight) -> Weight:
    """The weight of a 3x3 convolution (N, C, 3, 3) as that of a product, (9C, N); rows go through
    the channels of one position after another."""
    return np.ascontiguousarray(weight.transpose(2, 3, 1, 0).reshape(-1, len(weight)))


def quantize_weight(
    weight: Weight,
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """A weight (K, N) float32 as int8 (K, N) in -127..127 and a scale (N,) float32 of its columns;
    their product is within half a scale of the weight.

    x86 CPUs without VNNI add the products of two neighbours in K, each with an activation of up to
    255, in 16 bits that stop at their limits. The scale keeps what two neighbours can add up to
    within them: every CPU computes the same sums."""
    pairs = np.pad(weight, ((0, len(weight) % 2), (0, 0))).reshape(-1, 2, weight.shape[1])
    most = np.maximum(pairs.clip(min=0).sum(axis=1), -pairs.clip(max=0).sum(axis=1)).max(axis=0)
    scale = np.maximum(np.abs(weight).max(axis=0) / np.float32(127), most / np.float32(PAIR - 1))
    scale = np.maximum(scale, np.float32(1e-30)).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


def quantize_products(model: ModelProto) -> ModelProto:
    """A copy of a float32 graph in which every MatMul by a constant (K, N), both K and N at least
    `SMALLEST`, runs in int8, and every 3x3 convolution (stride 1, one zero around) to at least
    `NARROWEST` channels.

    MatMul nodes are the products over tokens. What is computed once for a video or an evaluation,
    the embeddings of action and flow time, has two dimensions and is a Gemm, which stays as it is:
    it is a few rows, and every token depends on it.
    """
    made = ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    weights = {t.name: t for t in graph.initializer}
    known = shape_inference.infer_shapes(model).graph
    shapes = {
        v.name: [d.dim_value for d in v.type.tensor_type.shape.dim]
        for v in (*known.input, *known.value_info)
    }
    new: dict[str, TensorProto] = {}

    def constant(name: str, value: npt.NDArray[np.generic]) -> str:
        if name not in new:
            new[name] = numpy_helper.from_array(value, name)
        return name

    nodes: list[NodeProto] = []
    for node in graph.node:
        weight = weights.get(node.input[1]) if node.op_type in ("MatMul", "Conv") else None
        if weight is None or not _large(node, weight.dims):
            nodes.append(node)
            continue
        # no dot: composition takes names with one for names of the state dictionary
        int8, scale = f"{weight.name}_int8", f"{weight.name}_scale"
        if int8 not in new:
            values = numpy_helper.to_array(weight)
            product = values if node.op_type == "MatMul" else as_product(values)
            narrow, scales = quantize_weight(product)
            constant(int8, narrow)
            constant(scale, scales)
        x, y = node.input[0], node.output[0]
        if node.op_type == "MatMul":
            name = f"{node.name}/int8"
            activations, x_scale, zero, quantize = _activations(name, x, y)
            nodes += [quantize, *_product(name, activations, y, (int8, scale), (x_scale, zero))]
            continue
        (height, width), channels = shapes[x][2:], weight.dims[1]
        constants = (
            constant(f"positions_{channels}", np.array([0, -1, channels])),
            constant("one_more", ONE_MORE),
            constant(f"around_{height}x{width}", _around(height, width)),
            constant(
                f"windows_{height}x{width}x{channels}", np.array([0, height, width, 9 * channels])
            ),
        )
        nodes += _convolution(node, (int8, scale), constants)
    del graph.node[:]
    graph.node.extend(nodes)
    used = {name for node in nodes for name in node.input}
    kept = [t for t in graph.initializer if t.name in used]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *new.values()])
    return made


def computes_in_int8(model: ModelProto) -> bool:
    """Whether `quantize_products` found a product in a graph."""
    return any(tensor.name.endswith("_int8") for tensor in model.graph.initializer)


def _large(node: NodeProto, dims: Iterable[int]) -> bool:
    """Whether a MatMul or Conv by a constant of these dimensions is one that int8 makes faster."""
    sizes = list(dims)
    if node.op_type == "MatMul":
        return len(sizes) == 2 and min(sizes) >= SMALLEST
    channels, inputs, *kernel = sizes
    given = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return (
        kernel == [3, 3]
        and channels >= NARROWEST
        and 9 * inputs >= SMALLEST
        and given.pop("pads", None) == [1] * 4
        and {**UNLESS_GIVEN, **given} == UNLESS_GIVEN
    )


UNLESS_GIVEN = {
    "auto_pad": b"NOTSET",
    "kernel_shape": [3, 3],
    "strides": [1, 1],
    "dilations": [1, 1],
    "group": 1,
}
"""What a 3x3 Conv is without attributes, but for its padding."""


ONE_MORE = np.array([0, 0, 0, 0, 1, 0])
"""Padding of (B, positions, C) by a position: the zeros around a picture."""


def _around(height: int, width: int) -> npt.NDArray[np.int32]:
    """Of every position of a picture the 3x3 around it (height, width, 9), counted through the
    picture; what is outside of it is the position after its last."""
    places = np.arange(height * width, dtype=np.int32).reshape(height, width)
    padded = np.pad(places, 1, constant_values=height * width)
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
    return windows.reshape(height, width, 9)


def _convolution(
    node: NodeProto, weight: tuple[str, str], constants: tuple[str, str, str, str]
) -> list[NodeProto]:
    """The nodes that take a Conv's place, channels last between two Transposes, which ONNX Runtime
    takes out between a norm over channels and a convolution, and between two of these. `constants`
    are the shape (B, positions, C), `ONE_MORE`, `_around` and the shape (B, height, width, 9C)."""
    (x, _, *bias), y = node.input, node.output[0]
    positions, one_more, around, shape = constants
    last, flat, padded, taken, windows, out, biased = (
        f"{y}_{part}" for part in ("last", "flat", "padded", "taken", "windows", "out", "biased")
    )
    name = f"{node.name}/int8"
    values, x_scale, zero, quantize = _activations(name, last, y)
    make = helper.make_node
    add = [make("Add", [out, *bias], [biased], f"{name}/bias")] if bias else []
    made = biased if bias else out
    return [
        make("Transpose", [x], [last], f"{name}/channels_last", perm=[0, 2, 3, 1]),
        quantize,
        make("Reshape", [values, positions], [flat], f"{name}/flat"),
        make("Pad", [flat, one_more, zero], [padded], f"{name}/pad"),
        make("Gather", [padded, around], [taken], f"{name}/around", axis=1),
        make("Reshape", [taken, shape], [windows], f"{name}/windows"),
        *_product(name, windows, out, weight, (x_scale, zero)),
        *add,
        make("Transpose", [made], [y], f"{name}/channels_first", perm=[0, 3, 1, 2]),
    ]


def _activations(name: str, x: str, y: str) -> tuple[str, str, str, NodeProto]:
    """The node that takes x to 8 bits for the product y, and the names of its outputs."""
    made = values, scale, zero = f"{y}_x", f"{y}_x_scale", f"{y}_x_zero"
    node = helper.make_node("DynamicQuantizeLinear", [x], list(made), f"{name}/activations")
    return values, scale, zero, node


def _product(
    name: str, values: str, y: str, weight: tuple[str, str], scaled: tuple[str, str]
) -> list[NodeProto]:
    """The nodes of y = x W from x in 8 bits, the names of W and of its scales, and of the scale and
    the zero point of x."""
    (int8, scale), (x_scale, zero) = weight, scaled
    total, real, scales = (f"{y}_{part}" for part in ("sum", "float", "scale"))
    make = helper.make_node
    return [
        make("MatMulInteger", [values, int8, zero], [total], f"{name}/product"),
        make("Cast", [total], [real], f"{name}/cast", to=TensorProto.FLOAT),
        make("Mul", [x_scale, scale], [scales], f"{name}/scales"),
        make("Mul", [real, scales], [y], f"{name}/scaled"),
    ]
