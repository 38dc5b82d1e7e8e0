"""Graph surgery on exported components: the flow loop, the whole frame as one graph.

Both are built by inlining exported graphs into a new one, so a composed graph computes exactly
what its parts compute. Weights keep their names and are shared by all inlined copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from canvasmar_rt.components import Component, TensorSpec, components
from canvasmar_rt.config import ModelConfig, SamplingConfig
from canvasmar_rt.schedule import order_temperatures, set_sizes

ELEMENT_TYPES = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int64": TensorProto.INT64,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
}


def value_info(
    spec: TensorSpec, dtype: str, dims: Mapping[str, int] | None = None
) -> onnx.ValueInfoProto:
    """ONNX description of one table entry; `dims` fixes symbolic dimensions."""
    fixed = dims or {}
    shape = [fixed.get(d, d) if isinstance(d, str) else d for d in spec.dims]
    element = ELEMENT_TYPES[dtype if spec.dtype == "hidden" else spec.dtype]
    return helper.make_tensor_value_info(spec.name, element, shape)


class Builder:
    """A graph under construction."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.initializers: dict[str, TensorProto] = {}
        self._count = 0

    def name(self, hint: str) -> str:
        self._count += 1
        return f"{hint}__{self._count}"

    def constant(self, value: npt.ArrayLike, hint: str) -> str:
        name = self.name(hint)
        self.initializers[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def op(self, op_type: str, inputs: Sequence[str], **attributes: Any) -> str:
        """Add a node and return the name of its output."""
        name = self.name(op_type.lower())
        self.nodes.append(
            helper.make_node(op_type, list(inputs), [name], self.name(op_type), **attributes)
        )
        return name

    def identity(self, source: str, target: str) -> None:
        self.nodes.append(helper.make_node("Identity", [source], [target], self.name("identity")))

    def inline(self, part: ModelProto, inputs: Mapping[str, str], label: str) -> dict[str, str]:
        """Copy the nodes of `part` in, reading its inputs from the named values. `label` is
        `<component>` or `<component>/<copy>`; copies of a component share its constants.

        Returns:
            The value that holds each of its outputs.
        """
        graph = part.graph
        names = dict(inputs)
        for tensor in graph.initializer:
            # state-dict weights are called the same in every copy; folded constants are not
            name = tensor.name if "." in tensor.name else f"{label.split('/')[0]}.{tensor.name}"
            names[tensor.name] = name
            if name not in self.initializers:
                copy = TensorProto()
                copy.CopyFrom(tensor)
                copy.name = name
                self.initializers[name] = copy
        missing = [i.name for i in graph.input if i.name not in names]
        assert not missing, f"{label}: inputs {missing} are not connected"
        prefix = self.name(label)
        for node in graph.node:
            self.nodes.append(_renamed(node, names, prefix))
        return {o.name: names.get(o.name, f"{prefix}/{o.name}") for o in graph.output}


def _renamed(node: NodeProto, names: Mapping[str, str], prefix: str) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)

    def new(name: str) -> str:
        return name and names.get(name, f"{prefix}/{name}")

    copy.name = f"{prefix}/{node.name}"
    copy.input[:] = [new(n) for n in node.input]
    copy.output[:] = [new(n) for n in node.output]
    for attribute in copy.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            body = attribute.g
            for value in (*body.input, *body.output):
                value.name = new(value.name)
            nodes = [_renamed(n, names, prefix) for n in body.node]
            del body.node[:]
            body.node.extend(nodes)
            assert not body.initializer, "a loop body keeps its weights in the outer graph"
    return copy


def model(
    builder: Builder,
    component: Component,
    dtype: str,
    opset: int,
    dims: Mapping[str, int] | None = None,
) -> ModelProto:
    """Close a builder into a model whose inputs and outputs are those of the component table."""
    graph = helper.make_graph(
        builder.nodes,
        component.name,
        [value_info(s, dtype, dims) for s in component.inputs],
        [value_info(s, dtype, dims) for s in component.outputs],
        list(builder.initializers.values()),
    )
    return helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10 if opset < 23 else 11,
        producer_name="canvasmar-rt",
    )


def flow(
    prepare: ModelProto,
    evaluate: ModelProto,
    config: ModelConfig,
    dtype: str,
    opset: int,
    *,
    evaluations: int | None = None,
) -> ModelProto:
    """The flow component: `evaluate` in a Scan over the E evaluations of the solver's plan, or
    copied `evaluations` times (CUDA graphs take no loops)."""
    component = components(config)["flow"]
    b = Builder()
    prepared = b.inline(
        prepare,
        {n: n for n in ("z_tokens", "select_index", "flow_noise", "flow_time")},
        "flow_prepare",
    )
    x0, time, *conditions = (prepared[o.name] for o in prepare.graph.output)
    fixed = {f"condition_{i}": name for i, name in enumerate(conditions)}
    fixed["branch_weight"] = "branch_weight"
    zero = b.op("Mul", [x0, b.constant(np.float32(0.0), "zero")])
    if evaluations is None:
        x = _scanned(b, evaluate, x0, zero, time, fixed)
    else:
        x = _unrolled(b, evaluate, x0, zero, time, fixed, evaluations)
    index = b.op(
        "Expand",
        [
            b.op("Unsqueeze", ["select_index", b.constant(np.array([2]), "axis")]),
            b.op("Shape", [x]),
        ],
    )
    if config.residual:
        x = b.op("Add", [x, b.op("GatherElements", ["partial", index], axis=1)])
    b.nodes.append(
        helper.make_node(
            "ScatterElements", ["partial", index, x], ["next_partial"], "put_tokens", axis=1
        )
    )
    return model(b, component, dtype, opset, {} if evaluations is None else {"E": evaluations})


def _unrolled(
    b: Builder,
    evaluate: ModelProto,
    x: str,
    velocity: str,
    time: str,
    fixed: Mapping[str, str],
    count: int,
) -> str:
    for e in range(count):
        at = b.constant(np.int64(e), "evaluation")
        now = {
            n: b.op("Gather", [source, at])
            for n, source in (("time", time), ("step_new", "step_new"), ("step_old", "step_old"))
        }
        wired = {"x": x, "velocity": velocity, **now, **fixed}
        made = b.inline(evaluate, wired, f"flow_evaluate/{e}")
        x, velocity = (made[o.name] for o in evaluate.graph.output)
    return x


def _scanned(
    b: Builder, evaluate: ModelProto, x0: str, zero: str, time: str, fixed: Mapping[str, str]
) -> str:
    body = Builder()
    body._count = 10_000  # names inside the body must not meet those outside
    loop_inputs = ["x", "velocity", "time", "step_new", "step_old"]
    wired = {n: f"flow_body/{n}" for n in loop_inputs}
    outputs = body.inline(evaluate, {**wired, **fixed}, "flow_evaluate")
    b.initializers.update(body.initializers)
    shapes = {i.name: i for i in evaluate.graph.input}

    def described(name: str, source: str) -> onnx.ValueInfoProto:
        info = onnx.ValueInfoProto()
        info.CopyFrom(shapes[source])
        info.name = name
        return info

    ends = []
    for out, source in zip(evaluate.graph.output, ("x", "velocity"), strict=True):
        end = f"flow_body/next_{source}"
        body.identity(outputs[out.name], end)
        ends.append(described(end, source))
    scan_body: GraphProto = helper.make_graph(
        body.nodes, "flow_evaluation", [described(wired[n], n) for n in loop_inputs], ends
    )
    x = b.name("x")
    b.nodes.append(
        helper.make_node(
            "Scan",
            [x0, zero, time, "step_new", "step_old"],
            [x, b.name("velocity")],
            "flow_loop",
            body=scan_body,
            num_scan_inputs=3,
        )
    )
    return x


def whole_frame(
    parts: Mapping[str, ModelProto],
    config: ModelConfig,
    sampling: SamplingConfig,
    dtype: str,
    opset: int,
    dims: Mapping[str, int],
    *,
    look_up: bool = False,
) -> ModelProto:
    """One latent frame as one graph: every component but encoder and decoder, K AR steps unrolled,
    the order drawn inside. Set sizes and order temperatures are constants; guidance weights, the
    flow plan and all noise are inputs. With `look_up` the first AR step is of the branches that
    see anything, as where components run one by one: in int8 those of a call share a scale."""
    component = components(config)["frame"]
    sizes = set_sizes(config.tokens, sampling.ar_steps)
    b = Builder()
    have = {s.name: s.name for s in component.inputs}

    def run(name: str, step: int = 0, **extra: str) -> dict[str, str]:
        part, at = parts[name], {**have, **extra}
        return b.inline(part, {i.name: at[i.name] for i in part.graph.input}, f"{name}/{step}")

    have.update(run("temporal"))
    if "history_bias" in have:
        have.update(_remembered(b, have))
    if config.canvas:
        have.update(run("canvas"))
    if config.condition_attention == "isolated":
        have.update(run("condition"))

    indices = _order(b, have.get("staticness"), sampling, sizes)
    partial = "latent"
    if not config.residual:  # an all-zero frame of the right batch
        partial = b.op("Mul", ["flow_noise", b.constant(np.float32(0.0), "zero")])
    for k in range(len(sizes)):
        step = {
            "select_index": indices[k],
            "mask_index": _concat(b, indices[k:]),
            "partial": partial,
        }
        if k:
            step["known_index"] = _concat(b, indices[:k])
        if look_up and not k:
            z = _seeing(b, run, have, components(config)["spatial_first"], step)
        else:
            z = run("spatial" if k else "spatial_first", k, **step)
        partial = run("flow", k, **step, **z)["next_partial"]
    have["next_latent"], have["order"] = partial, _concat(b, indices)
    for spec in component.outputs:
        if have[spec.name] != spec.name:
            b.identity(have[spec.name], spec.name)
    return model(b, component, dtype, opset, dims)


def _seeing(
    b: Builder,
    run: Callable[..., dict[str, str]],
    have: Mapping[str, str],
    first: Component,
    step: Mapping[str, str],
) -> dict[str, str]:
    """The first set's embeddings in the branches that see anything, then those of the one that
    does not, if there is one."""
    front = b.constant(np.array([0]), "front")
    on = [have[name] for name in ("temporal_on", "canvas_on") if name in have]
    count = b.op("ReduceSum", [b.op("Max", on), front], keepdims=1)
    seeing = b.op("Cast", [count], to=TensorProto.INT64)
    rest = b.op("Sub", [b.op("Shape", [on[0]]), seeing])

    def head(value: str, end: str) -> str:
        return b.op("Slice", [value, front, end, front])

    heads = {s.name: head(have[s.name], seeing) for s in first.inputs if "G" in s.dims}
    seen = run("spatial_first", 0, **step, **heads)["z_tokens"]
    found = head(run("unconditional", 0, **step)["z_tokens"], rest)
    return {"z_tokens": b.op("Concat", [seen, found], axis=0)}


def _remembered(b: Builder, have: Mapping[str, str]) -> dict[str, str]:
    """The ring with this frame's keys and values in the slot that opens: it may be read afterwards
    and not before."""
    opens = b.op("Greater", ["history_bias", "cache_bias"])  # (B, F)
    opens = b.op("Transpose", [opens], perm=[1, 0])
    opens = b.op("Unsqueeze", [opens, b.constant(np.array([2, 3]), "axes")])
    front = b.constant(np.array([0]), "axes")
    rings = {n: n.replace("new_", "cache_") for n in have if n.startswith("new_")}
    return {
        ring: b.op("Where", [opens, b.op("Unsqueeze", [have[new], front]), ring])
        for new, ring in rings.items()
    }


def _concat(b: Builder, values: Sequence[str]) -> str:
    return values[0] if len(values) == 1 else b.op("Concat", values, axis=1)


def _order(
    b: Builder, staticness: str | None, sampling: SamplingConfig, sizes: Sequence[int]
) -> list[str]:
    """`canvasmar_rt.schedule.generation_order` in ONNX: the indices (B, n_k) of every AR step."""
    tau = order_temperatures(sampling, has_staticness=staticness is not None)
    axes = b.constant(np.array([1]), "axis")
    score = ""
    if staticness is not None and sampling.order != "random":
        floor = b.constant(np.float32(1e-6), "floor")
        score = b.op("Log", [b.op("Max", [staticness, floor])])
    taken = ""
    indices = []
    for k, size in enumerate(sizes):
        at = b.constant(np.array([k]), "step")
        noise = b.op("Gather", ["order_noise", at], axis=1)
        noise = b.op("Mul", [b.op("Squeeze", [noise, axes]), b.constant(tau[k], "tau")])
        total = b.op("Add", [score, noise]) if score else noise
        if taken:
            total = b.op("Add", [total, taken])
        index = b.name("index")
        b.nodes.append(
            helper.make_node(
                "TopK",
                [total, b.constant(np.array([size]), "size")],
                [b.name("best"), index],
                b.name("topk"),
                axis=1,
                largest=1,
                sorted=1,
            )
        )
        indices.append(index)
        if k + 1 < len(sizes):
            if not taken:
                taken = b.op("Mul", [total, b.constant(np.float32(0.0), "zero")])
            gone = b.op("Expand", [b.constant(np.float32(-1e30), "gone"), b.op("Shape", [index])])
            taken = b.op("ScatterElements", [taken, index, gone], axis=1)
    return indices
