"""The one table of graph inputs and outputs: names, dtypes and dimensions of every component.

Export writes graphs by this table, engines bind by it, the bundle records it. Symbolic dimensions:
B batch, G guidance branches, K tokens already drawn, S tokens drawn now, M tokens not drawn yet
(the S among them first), E evaluations of the flow head, R its rows: B, or B * J where groups of J
latent frames are drawn. All others are fixed numbers.

One latent frame runs: temporal, [canvas], [condition], spatial_first, flow, then spatial and flow
for every further AR step, decoder. What spatial_first gives for a branch that sees nothing is the
same in every frame: `unconditional` looks it up. `frame` is all but the decoder in one graph. A
next-group model has no `frame`; it takes its group apart with `split`, decodes each, and feeds all
but the last to the temporal step at once. A unified model's temporal step gives the keys and
values of a complete frame and nothing else; its spatial graphs read the ring of them.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from canvasmar_rt.config import AutoencoderConfig, ModelConfig

DType = Literal["float32", "hidden", "int64", "uint8"]
"""`hidden` is the dtype the bundle was exported in (float32, float16 or bfloat16)."""

Dims = tuple[int | str, ...]

MASKED = -1e4
"""Bias of a cache slot that may not be seen; finite in every dtype."""


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and dimensions of a graph input or output."""

    name: str
    dtype: DType
    dims: Dims


@dataclasses.dataclass(frozen=True)
class Component:
    """One exported graph. `file` is relative to the bundle."""

    name: str
    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def autoencoder_states(config: AutoencoderConfig, *, decoder: bool) -> list[tuple[int, ...]]:
    """Shapes, without batch, of the causal-convolution histories, in the order they are used."""
    past = config.kernel(decoder=decoder) - 1
    if past == 0:
        return []
    sizes = [
        (w, config.height // config.patch // 2**i, config.width // config.patch // 2**i)
        for i, w in enumerate(config.widths)
    ]
    if decoder:
        sizes = sizes[::-1]
        entry = (config.latent_channels, *sizes[0][1:])
    else:
        entry = (3 * config.temporal_compression * config.patch**2, *sizes[0][1:])
    return [(past, *entry)] + [(past, *s) for s in sizes for _ in range(config.blocks)]


def components(config: ModelConfig) -> dict[str, Component]:
    """All components of a model, by name."""
    ae = config.autoencoder
    n, p, d = config.tokens, config.temporal_tokens, config.dim
    c, f, t = ae.latent_channels, config.context_frames, ae.temporal_compression
    latent = TensorSpec("latent", "float32", ("B", n, c))
    frames = TensorSpec("frames", "uint8", ("B", t, ae.height, ae.width, 3))
    z_temporal = TensorSpec("z_temporal", "hidden", ("B", p, d))
    group: Dims = ("B", *config.group_shape)
    rows = "R" if config.group > 1 else "B"
    z_canvas = TensorSpec("z_canvas", "hidden", (*group, n, d))

    def states(prefix: str, decoder: bool) -> tuple[TensorSpec, ...]:
        shapes = autoencoder_states(ae, decoder=decoder)
        return tuple(TensorSpec(f"{prefix}_{i}", "hidden", ("B", *s)) for i, s in enumerate(shapes))

    def per_layer(prefix: str, dims: Dims, layers: int) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(f"{prefix}_{kind}_{i}", "hidden", dims)
            for i in range(layers)
            for kind in ("key", "value")
        )

    action: tuple[TensorSpec, ...] = ()
    if config.action_dim:
        action = (
            TensorSpec("action", "float32", ("B", config.action_dim)),
            TensorSpec("action_given", "float32", ("B",)),
        )
    rotation: Dims = (2, config.time_rotary_pairs)
    ring = per_layer("cache", (f, "B", p, d), config.temporal_layers)
    temporal_in = (
        latent,
        TensorSpec("is_first", "float32", ("B",)),
        *action,
        TensorSpec("time", "float32", rotation),
        TensorSpec("cache_bias", "float32", ("B", f)),
        *ring,
    )
    temporal_new = per_layer("new", ("B", p, d), config.temporal_layers)
    canvas_in = (
        TensorSpec("frame_noise", "float32", ("B", n, c)),
        TensorSpec("frame_noise_level", "float32", ()),
        TensorSpec("canvas_noise", "float32", (*group, n, d)),
        TensorSpec("canvas_noise_level", "float32", ()),
    )
    canvas_out = (
        TensorSpec("canvas", "float32", (*group, n, c)),
        TensorSpec("staticness", "float32", (*group, n)),
    )
    branches: tuple[TensorSpec, ...] = (
        TensorSpec("temporal_on", "float32", ("G",)),
        TensorSpec("canvas_on", "float32", ("G",)),
    )
    branch_weight = TensorSpec("branch_weight", "float32", ("G",))
    isolated = config.condition_attention == "isolated"
    condition_kv = per_layer("condition", ("G", "B", p, d), config.spatial_layers)
    condition = condition_kv if isolated else (z_temporal, branches[0])
    canvas_tokens = (z_canvas, branches[1]) if config.canvas else ()
    first = (*condition, *canvas_tokens, TensorSpec("mask_index", "int64", (*group, n)))
    later = (*condition, *canvas_tokens, TensorSpec("mask_index", "int64", (*group, "M")))
    home = "spatial"  # where the weights are that the spatial graphs read
    z_out: tuple[TensorSpec, ...] = (z_temporal,)
    told: tuple[TensorSpec, ...] = ()
    if config.family == "unified":
        told = (
            TensorSpec("draw_time", "float32", rotation),
            TensorSpec("history_bias", "float32", ("B", f)),
        )
        branches, z_out, home = branches[:1], (), "temporal"
        first = later = (*branches, *told, *ring)

    def partly_drawn(*batch: int | str) -> tuple[TensorSpec, TensorSpec, TensorSpec]:
        return (
            TensorSpec("select_index", "int64", (*batch, "S")),
            TensorSpec("partial", "float32", (*batch, n, c)),
            TensorSpec("z_tokens", "hidden", ("G", *batch, "S", d)),
        )

    select, partial, z_tokens = partly_drawn(*group)
    select_row, partial_row, z_row = partly_drawn(rows)
    flow_noise = TensorSpec("flow_noise", "float32", (rows, n, c))
    plan = (
        TensorSpec("flow_time", "float32", ("E",)),
        TensorSpec("step_new", "float32", ("E",)),
        TensorSpec("step_old", "float32", ("E",)),
    )
    table = [
        Component(
            "encoder",
            "encoder/model.onnx",
            (frames, *states("state", False)),
            (latent, *states("next_state", False)),
        ),
        Component("temporal", "temporal/model.onnx", temporal_in, (*z_out, *temporal_new)),
    ]
    if config.canvas:
        table.append(
            Component(
                "canvas",
                "canvas/model.onnx",
                (z_temporal, latent, *canvas_in),
                (z_canvas, *canvas_out),
            )
        )
    if isolated:
        table.append(
            Component(
                "condition", "spatial/condition.onnx", (z_temporal, branches[0]), condition_kv
            )
        )
    if not told:
        table.append(
            Component(
                "unconditional",
                "spatial/unconditional.onnx",
                (select,),
                (dataclasses.replace(z_tokens, dims=(1, *z_tokens.dims[1:])),),
            )
        )
    table += [
        Component(
            "spatial_first",
            f"{home}/first.onnx",
            (*first, select),
            (z_tokens,),
        ),
        Component(
            "spatial",
            f"{home}/later.onnx" if told else "spatial/model.onnx",
            (*later, select, partial, TensorSpec("known_index", "int64", (*group, "K"))),
            (z_tokens,),
        ),
        Component(
            "flow",
            "flow/model.onnx",
            (z_row, branch_weight, select_row, flow_noise, *plan, partial_row),
            (TensorSpec("next_partial", "float32", (rows, n, c)),),
        ),
        Component(
            "decoder",
            "decoder/model.onnx",
            (latent, *states("state", True)),
            (frames, *states("next_state", True)),
        ),
    ]
    if config.group > 1:
        parts = tuple(
            TensorSpec(f"latent_{j}", "float32", ("B", n, c)) for j in range(config.group)
        )
        drawn = TensorSpec("drawn", "float32", (*group, n, c))
        table.append(Component("split", "flow/split.onnx", (drawn,), parts))
    else:
        table.append(
            Component(
                "frame",
                "frame.onnx",
                (
                    *temporal_in,
                    *told,
                    *(canvas_in if config.canvas else ()),
                    *branches,
                    branch_weight,
                    TensorSpec("order_noise", "float32", ("B", "AR", n)),
                    flow_noise,
                    *plan,
                ),
                (
                    TensorSpec("next_latent", "float32", ("B", n, c)),
                    *(canvas_out if config.canvas else ()),
                    TensorSpec("order", "int64", ("B", n)),
                    *temporal_new,
                ),
            )
        )
    return {component.name: component for component in table}
