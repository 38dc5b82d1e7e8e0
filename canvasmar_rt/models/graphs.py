"""The components as modules with flat inputs and outputs in the order of `components`.

Export traces these, and the torch engine runs them: one definition of what a component computes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from canvasmar_rt.components import Component, components
from canvasmar_rt.errors import ConfigError
from canvasmar_rt.models.canvasmar import (
    CanvasMAR,
    FrameModel,
    gather_tokens,
    in_branches,
    put_tokens,
)
from canvasmar_rt.models.unified import UnifiedMAR


class Graph(nn.Module):
    """One component: `forward` takes its inputs positionally and returns a tuple of outputs."""

    def __init__(self, model: FrameModel, name: str) -> None:
        super().__init__()
        self.config = model.config
        self.component: Component = components(model.config)[name]

    def named(self, args: tuple[Tensor, ...]) -> dict[str, Tensor]:
        return dict(zip((s.name for s in self.component.inputs), args, strict=True))


class EncoderGraph(Graph):
    def __init__(self, model: FrameModel) -> None:
        super().__init__(model, "encoder")
        self.autoencoder = model.autoencoder

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        frames, *states = args
        latent, new = self.autoencoder.encode(frames, states)
        return latent[:, 0], *new


class DecoderGraph(Graph):
    def __init__(self, model: FrameModel) -> None:
        super().__init__(model, "decoder")
        self.autoencoder = model.autoencoder

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        latent, *states = args
        frames, new = self.autoencoder.decode(latent[:, None], states)
        return frames, *new


class TemporalGraph(Graph):
    def __init__(self, model: FrameModel) -> None:
        super().__init__(model, "temporal")
        self.temporal = model.temporal

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        t = self.named(args)
        caches = [t[s.name] for s in self.component.inputs if s.name.startswith("cache_")][1:]
        z_temporal, new = self.temporal.step(
            t["latent"],
            t["is_first"],
            t.get("action"),
            t.get("action_given"),
            t["time"],
            t["cache_bias"],
            caches,
        )
        return (z_temporal, *new) if self.temporal.reads_out else (*new,)


class CanvasGraph(Graph):
    def __init__(self, model: CanvasMAR) -> None:
        super().__init__(model, "canvas")
        self.canvas = model.canvas

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        t = self.named(args)
        r, r2 = t["frame_noise_level"], t["canvas_noise_level"]
        noised = t["latent"] * (1 - r) + t["frame_noise"] * r  # eq. 11
        assert self.canvas is not None
        z_canvas, canvas, staticness = self.canvas(t["z_temporal"], noised, t["latent"])
        z_canvas = (z_canvas * (1 - r2) + t["canvas_noise"] * r2).to(z_canvas.dtype)  # eq. 12
        return z_canvas, canvas, staticness


class ConditionGraph(Graph):
    """Keys and values of z_t and, as one row more of the batch, of what branches that do not see it
    read instead: once for all guidance branches."""

    def __init__(self, model: CanvasMAR) -> None:
        super().__init__(model, "condition")
        self.spatial = model.spatial

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        t = self.named(args)
        z_temporal = t["z_temporal"]
        unseen = self.spatial.no_temporal.expand(1, *z_temporal.shape[1:])
        cached = self.spatial.condition_keys_values(torch.cat([unseen, z_temporal]))
        return tuple(in_branches(t["temporal_on"], x[1:], x[:1]) for kv in cached for x in kv)


class SpatialGraph(Graph):
    """Token embeddings of the next set for every guidance branch; the first AR step, which knows
    no token yet, is a graph of its own (TensorRT takes no empty tensors)."""

    def __init__(self, model: CanvasMAR, name: str) -> None:
        super().__init__(model, name)
        self.spatial = model.spatial
        self._condition, self._mask = model.condition_tokens, model.mask_tokens

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        per_frame = ("z_canvas", "mask_index", "partial", "known_index")
        t = self.named(args)
        if self.config.group > 1:  # frames become rows of the batch
            t |= {name: t[name].flatten(0, 1) for name in per_frame if name in t}
        condition: Tensor | list[tuple[Tensor, Tensor]]
        if self.spatial.isolated:
            flat = [x.flatten(0, 1) for name, x in t.items() if name.startswith("condition_")]
            condition = list(zip(flat[::2], flat[1::2], strict=True))
            branches = t["condition_key_0"].shape[0]
        else:
            tokens = self._condition(t["z_temporal"], t["temporal_on"])
            branches = tokens.shape[0]
            condition = tokens.flatten(0, 1)

        def rows(x: Tensor) -> Tensor:
            return x[None].expand(branches, *x.shape).flatten(0, 1)

        if self.config.canvas:
            canvas = self._mask(t["z_canvas"], t["canvas_on"]).flatten(0, 1)
        else:
            mask = self.spatial.mask
            batch = t["mask_index"].shape[0]
            canvas = mask.expand(branches * batch, self.config.tokens, mask.shape[0])
        known = {}
        if "known_index" in t:
            known = {
                "known_tokens": rows(gather_tokens(t["partial"], t["known_index"])),
                "known_index": rows(t["known_index"]),
            }
        select = t["select_index"].shape[-1]
        z = self.spatial(condition, canvas, rows(t["mask_index"]), select, **known)
        return (z.unflatten(0, (branches, *t["select_index"].shape[:-1])),)


class DrawGraph(Graph):
    """`SpatialGraph` of a unified model."""

    def __init__(self, model: UnifiedMAR, name: str) -> None:
        super().__init__(model, name)
        self.temporal = model.temporal

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        t = self.named(args)
        tokens, index = None, t.get("known_index")
        if index is not None:
            tokens = gather_tokens(t["partial"], index)
        x = self.temporal.draw_tokens(t["select_index"].shape[0], tokens, index)
        caches = [x for name, x in t.items() if name.startswith("cache_")]
        z = self.temporal.draw(
            x, t["select_index"], t["temporal_on"], t["draw_time"], t["history_bias"], caches
        )
        return (z,)


class FlowPrepare(nn.Module):
    """Everything of the flow component that does not change from evaluation to evaluation; with
    `cut`, for an exported graph, the condition in its parts."""

    def __init__(self, model: FrameModel, *, cut: bool = False) -> None:
        super().__init__()
        self.flow, self.cut = model.flow, cut

    def forward(
        self, z_tokens: Tensor, select_index: Tensor, flow_noise: Tensor, flow_time: Tensor
    ) -> tuple[Tensor, ...]:
        """-> x_0 (B, S, C), time (E, .), and what is `given` of the condition, (G, B, S, .)"""
        condition = self.flow.embed_condition(z_tokens)
        return (
            gather_tokens(flow_noise, select_index),
            self.flow.embed_time(flow_time),
            *(self.flow.given(condition) if self.cut else (condition,)),
        )


class FlowEvaluation(nn.Module):
    """One evaluation of the guided velocity and the solver's update (eq. 9, `FlowPlan`)."""

    def __init__(self, model: FrameModel) -> None:
        super().__init__()
        self.flow = model.flow

    def forward(
        self,
        x: Tensor,
        velocity: Tensor,
        time: Tensor,
        step_new: Tensor,
        step_old: Tensor,
        branch_weight: Tensor,
        *given: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """x and the last velocity (B, S, C) -> the next ones."""
        branches = self.flow.evaluate(x, time, given)
        guided = (branches * branch_weight[:, None, None, None]).sum(0)
        return x + step_new * guided + step_old * velocity, guided


class FlowGraph(Graph):
    """Draws the tokens of one set and puts them into the partial frame."""

    def __init__(self, model: FrameModel) -> None:
        super().__init__(model, "flow")
        self.prepare, self.evaluate = FlowPrepare(model), FlowEvaluation(model)

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        t = self.named(args)
        x, times, *given = self.prepare(
            t["z_tokens"], t["select_index"], t["flow_noise"], t["flow_time"]
        )
        velocity = torch.zeros_like(x)
        for time, new, old in zip(times, t["step_new"], t["step_old"], strict=True):
            x, velocity = self.evaluate(x, velocity, time, new, old, t["branch_weight"], *given)
        return (put_tokens(t["partial"], t["select_index"], x, add=self.config.residual),)


class SplitGraph(Graph):
    """The latent frames of a group, one by one."""

    def __init__(self, model: FrameModel) -> None:
        super().__init__(model, "split")

    def forward(self, *args: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.clone() for x in args[0].unbind(1))


def graph(model: FrameModel, name: str) -> Graph:
    """The module of one component.

    Raises:
        ConfigError: if the model has no such component, or it is composed from others (`frame`).
    """
    if name not in components(model.config) or name == "frame":
        raise ConfigError(f"{model.config.name}: no component module {name!r}")
    if name in ("spatial", "spatial_first"):
        if isinstance(model, UnifiedMAR):
            return DrawGraph(model, name).eval()
        assert isinstance(model, CanvasMAR)
        return SpatialGraph(model, name).eval()
    kinds: dict[str, Callable[[Any], Graph]] = {
        "encoder": EncoderGraph,
        "decoder": DecoderGraph,
        "temporal": TemporalGraph,
        "canvas": CanvasGraph,
        "condition": ConditionGraph,
        "flow": FlowGraph,
        "split": SplitGraph,
    }
    made: Graph = kinds[name](model).eval()
    return made
